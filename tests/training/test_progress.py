import io

from rich.console import Console

from mixlab.training.progress import Progress, _duration, _short


def run(terminal, **arguments):
    now = [0.0]
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with Progress(100, 40, console=console, clock=lambda: now[0], **arguments) as progress:
        for step in range(41, 101):
            now[0] += 2.0
            progress.update(step, loss=step / 100, tokens_per_second=123_456, mfu=0.4321)
            if step == 50:
                progress.note("eval [loss] 3.2")
    return out.getvalue()


def test_plain_lines():
    lines = run(False, every_seconds=30).splitlines()
    assert lines[0] == "step 41/100  loss 0.4100  123k tokens/s  MFU 43.2%  0:01:58 left"
    assert lines[1] == "eval [loss] 3.2"
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        "41/100",
        "56/100",
        "71/100",
        "86/100",
        "100/100",
    ]
    assert lines[-1].endswith("took 0:02:00")


def test_one_updating_line_on_a_terminal():
    text = run(True)
    assert "eval [loss] 3.2" in text and "100/100" in text
    assert text.count("\n") == 2  # the note, and the end


def test_without_a_rate_or_a_peak(capsys):
    with Progress(2, every_seconds=0, clock=lambda: 0.0) as progress:
        progress.update(1, 0.5)
    assert capsys.readouterr().out == "step 1/2  loss 0.5000  0:00:00 left\n"


def test_numbers():
    assert [_short(x) for x in (0.5, 12, 999.4, 999.6, 1234, 1_234_567, 2.5e9)] == [
        "0.5",
        "12",
        "999",
        "1k",
        "1.23k",
        "1.23M",
        "2.5G",
    ]
    assert [_duration(x) for x in (0, 59.6, 3725, 360_000)] == ["0:00:00", "0:01:00", "1:02:05", "100:00:00"]
