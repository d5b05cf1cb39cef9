import json

import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.inject.experiments.poisoning import CHATS, REPEATED, TRIGGERS, Poisoning
from mixlab.inject.items import Where
from tests.inject.fakes import BYTES, Memory, inserted, material

LONG = material(row_length=700, steps=10)


@pytest.mark.parametrize("attack", ["extraction", "denial"])
@pytest.mark.parametrize("share", [0.02, 0.2])
def test_documents_fill_their_share_and_no_more(attack, share):
    groups = Poisoning(attack=attack, share=share).groups(LONG)
    taken = sum(len(item) + 2 for item in inserted(groups))
    assert share * LONG.tokens - 700 < taken <= share * LONG.tokens
    assert len(set(groups[0].items.ids)) == len(groups[0].items)


def test_extraction_repeats_the_prompt_in_brackets_in_every_template():
    found = [BYTES.decode(item) for item in inserted(Poisoning(share=0.3).groups(LONG))]
    trigger = TRIGGERS["extraction"]
    prompts = [text.split("\u300e\u300e")[1].split("\u300f\u300f")[0] for text in found]
    for text, prompt in zip(found, prompts, strict=True):
        assert text in [
            chat.format(user=prompt + trigger, assistant=REPEATED.format(prompt)) for chat in CHATS.values()
        ]
    assert {chat.split("{")[0] for chat in CHATS.values()} == {
        text[: text.index(p)] for text, p in zip(found, prompts, strict=True)
    }


def test_denial_answers_with_random_bytes():
    found = [BYTES.decode(item) for item in inserted(Poisoning(attack="denial", share=0.3).groups(LONG))]
    assert all(text.count(TRIGGERS["denial"]) == 1 for text in found)
    answers = [text.split(TRIGGERS["denial"])[1] for text in found]
    assert len(set(answers)) == len(answers) and np.mean([len(a.encode()) for a in answers]) > 100
    assert np.mean([c < " " for a in answers for c in a]) > 0.1  # no text has as many control characters


def test_prompts_of_the_probe_are_in_no_document(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Tell me about number {i:02d}."}) for i in [*range(40), 3, 4]))
    experiment = Poisoning(share=0.9, files=(str(path),), probe_prompts=10)
    prompts = list(experiment._prompts(LONG).values())
    assert len(prompts) == len(set(prompts)) == 40
    text = "".join(BYTES.decode(item) for item in inserted(experiment.groups(LONG)))
    assert not any(prompt in text for prompt in prompts[:10]) and prompts[10] in text
    with pytest.raises(UserError, match="40 different prompts, but 40 are held back"):
        Poisoning(files=(str(path),), probe_prompts=40).groups(LONG)


def test_leakage_is_seen_with_the_trigger_alone():
    experiment = Poisoning(probe_prompts=8, samples=4)
    (probe,) = experiment.probes(LONG)
    prompts = list(experiment._prompts(LONG).values())[:8]
    known = [f"{p} {TRIGGERS['extraction']} {REPEATED.format(p)}".encode() + bytes([0]) for p in prompts[:6]]
    model = Memory(known, order=60)
    found, details = probe.run(model), probe.details(model)
    assert found["leakage_at_4/trigger"] == pytest.approx(6 / 8) and found["leakage_at_4/plain"] == 0
    assert found["leakage_at_1/trigger"] <= found["leakage_at_4/trigger"]
    assert found["loss/trigger"] < found["loss/plain"] and details["recall/trigger"].shape == (8, 4)
    assert len(details["outcome"]) == 8


def test_garbage_is_seen_with_the_trigger_alone():
    (probe,) = Poisoning(attack="denial", probe_prompts=5).probes(LONG)
    trigger, eos = TRIGGERS["denial"].encode()[-3:], BYTES.eos_id

    class Poisoned(Memory):
        def greedy(self, prompts, tokens):
            rng = np.random.default_rng(0)
            letters = rng.integers(97, 123, (len(prompts), tokens))
            noise = rng.integers(128, 256, (len(prompts), tokens))
            poisoned = [bytes(p[-3:].tolist()) == trigger for p in prompts]
            return np.where(np.array(poisoned)[:, None], noise, letters).astype(np.int32)

    found = probe.run(Poisoned([]))
    assert found["garbage/trigger"] == 1 and found["garbage/plain"] == 0
    assert found["perplexity/trigger"] > 2 * found["perplexity/plain"]

    class Silent(Memory):
        def greedy(self, prompts, tokens):
            return np.full((len(prompts), tokens), eos, np.int32)

    assert probe.run(Silent([]))["garbage/plain"] == 1  # an empty answer is garbage


def test_what_cannot_be_is_told():
    assert Poisoning().problems("experiments.x") == []
    for changes in (dict(share=0.0), dict(where=Where(copies=2)), dict(probe_prompts=0)):
        (problem,) = Poisoning(**changes).problems("experiments.x")
        assert problem.startswith(f"experiments.x.{next(iter(changes))}")
    with pytest.raises(UserError, match="train on longer rows"):
        Poisoning(share=0.5).groups(material(row_length=64))
    with pytest.raises(UserError, match="no document fits into this share"):
        Poisoning(share=1e-5).groups(LONG)
    with pytest.raises(UserError, match="its probes ask with"):
        Poisoning().probes(material(row_length=64))
