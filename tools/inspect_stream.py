"""Shows what a run reads: a step's rows as text with their provenance, or every place of a document or an inserted item.

python tools/inspect_stream.py --config=FILE --step=N [--row=R] [--json]
python tools/inspect_stream.py --config=FILE --document=SOURCE:ID [--json]
python tools/inspect_stream.py --config=FILE --experiment=NAME [--item=ITEM] [--json]

With --workdir=RUN_DIR instead of --config: what that run reads, with what was decided while it was trained.
"""

import dataclasses
import difflib
import json
import sys

import pyarrow.compute as pc

from mixlab import errors
from mixlab.cli import Parser
from mixlab.data import Data, open_data, with_decisions
from mixlab.errors import UserError
from mixlab.inject.control_log import whole_log
from mixlab.stream import Kind


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0], with_run=True)
    parser.add_argument("--step", type=int, metavar="N", help="the step, counted from 0")
    parser.add_argument("--row", type=int, metavar="R", help="one row of it; all when left out")
    parser.add_argument("--document", metavar="SOURCE:ID", help="a document by its id, or by its number as #123")
    parser.add_argument("--experiment", metavar="NAME", help="all that an experiment inserts")
    parser.add_argument("--item", metavar="ITEM", help="one item of it, by its name")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    flags, config = parser.parse_config(arguments)
    if sum(flag is not None for flag in (flags.step, flags.document, flags.experiment)) != 1:
        raise UserError("give one of --step=N, --document=SOURCE:ID and --experiment=NAME")
    if flags.item is not None and flags.experiment is None:
        raise UserError("--item belongs to --experiment=NAME; give it too")
    data = open_data(config)
    if flags.workdir is not None:
        data = with_decisions(config, data, whole_log(flags.workdir))
    if flags.experiment is not None:
        found = insertions(data, flags.experiment, flags.item)
        print(json.dumps(found, indent=2) if flags.json else _insertions_text(found))
    elif flags.document is not None:
        found = document_places(data, flags.document)
        print(json.dumps(found, indent=2) if flags.json else _places_text(found))
    else:
        rows = step_rows(data, flags.step, flags.row)
        noise = data.stream.noises.get(flags.step)
        told = {"experiment": noise.name, "sigma": noise.sigma} if noise else None
        found = {"step": flags.step, "noise": told, "rows": rows}
        print(json.dumps(found, indent=2) if flags.json else _rows_text(found))


def step_rows(data: Data, step: int, row: int | None) -> list[dict]:
    """The rows of a step (all, or one) with their spans: what each token is, where it comes from, and its text."""
    stream = data.stream
    if not 0 <= step < len(stream):
        raise UserError(f"--step={step}: the run has steps 0 to {len(stream) - 1}")
    batch = stream[step]
    if row is not None and not 0 <= row < len(batch.tokens):
        raise UserError(f"--row={row}: a step has rows 0 to {len(batch.tokens) - 1}")
    names = stream.names
    rows = []
    for r in range(len(batch.tokens)) if row is None else [row]:
        spans = []
        for span in batch.spans[batch.spans["row"] == r]:
            offset, length = int(span["offset"]), int(span["length"])
            entry = {"offset": offset, "length": length, "kind": Kind(span["kind"]).name.lower()}
            if span["kind"] == Kind.INSERTED:
                inserted = stream.insertions.entry(int(span["document"]))
                entry |= {key: inserted[key] for key in ("experiment", "item", "copy")}
            elif span["kind"] != Kind.PADDING:
                name, document = names[span["source"]], int(span["document"])
                metadata = data.stores[name].metadata(document)
                entry |= {"source": name, "document": document, "start": int(span["start"])}
                entry |= {key: metadata[key] for key in ("id", "url", "domain") if metadata.get(key)}
            here = slice(offset, offset + length)
            entry["loss_tokens"] = int((batch.loss_weights[r, here] > 0).sum())
            entry["text"] = data.tokenizer.decode(batch.tokens[r, here])
            spans.append(entry)
        rows.append({"row": r, "spans": spans})
    return rows


def insertions(data: Data, name: str, item: str | None) -> dict:
    """Every insertion of an experiment, or of one of its items, as the ledger has them, in training order; and the steps whose
    embeddings it adds noise to."""
    placements = data.stream.insertions
    if name not in data.experiments:
        near = difflib.get_close_matches(name, data.experiments, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(data.experiments) or 'none'}"
        raise UserError(f"--experiment={name}: is not among the experiments; {hint}")
    found = placements.find(name, item) if placements is not None and name in placements.names else []
    if item is not None and not len(found):
        raise UserError(f"--item={item}: {name} inserts no item of this name; see all of them without --item")
    noised = [step for step, noise in sorted(data.stream.noises.items()) if noise.name == name]
    listed = [placements.entry(int(number)) for number in found]
    return {"experiment": name, "insertions": listed, "noised_steps": noised}


def document_places(data: Data, asked: str) -> dict:
    """Every place of the run at which a document ("source:id" or "source:#number") is read."""
    source, colon, wanted = asked.partition(":")
    if not colon or source not in data.stream.names:
        raise UserError(f"--document={asked}: write SOURCE:ID with a source of {', '.join(data.stream.names)}")
    store = data.stores[source]
    if wanted.startswith("#") and wanted[1:].isdigit() and int(wanted[1:]) < len(store):
        document = int(wanted[1:])
    else:
        document = pc.index(store.column("id"), wanted).as_py()
    if document < 0:
        raise UserError(f"--document={asked}: {source} has no document with this id (nor with this number)")
    metadata = store.metadata(document)
    places = [dataclasses.asdict(place) for place in data.stream.find(source, document)]
    held_out = metadata["split"] != "train"
    return {"source": source, "document": document, "metadata": metadata, "held_out": held_out, "places": places}


def _rows_text(found: dict) -> str:
    lines = [f"step {found['step']}"]
    if noise := found["noise"]:
        lines.append(f"every row has noise on its embeddings, sigma {noise['sigma']:g}: {noise['experiment']}")
    for row in found["rows"]:
        lines.append(f"── row {row['row']}")
        for span in row["spans"]:
            place = f"{span['offset']:>6} +{span['length']:<6} {span['kind']:<8}"
            if "document" in span:
                place += f" {span['source']}:#{span['document']} from {span['start']}  {span.get('url') or span['id']}"
            if "experiment" in span:
                place += f" {span['experiment']}: item {span['item']}, copy {span['copy']}"
            lines.append(place + f"  (loss on {span['loss_tokens']})")
            if span["kind"] in ("text", "metadata", "inserted"):
                lines += ["        │ " + line for line in span["text"].splitlines() or [""]]
    return "\n".join(lines)


def _insertions_text(found: dict) -> str:
    if noised := found["noised_steps"]:
        return f"{found['experiment']}\nnoise on the embeddings of steps {', '.join(map(str, noised))}"
    if not found["insertions"]:
        return f"{found['experiment']}\ninserts nothing in this run"
    return "\n".join(
        [found["experiment"]]
        + [
            f"step {i['step']:>8}  row {i['row']:>6}  offset {i['offset']:>6} +{i['length']:<6} item {i['item']}, copy {i['copy']}"
            for i in found["insertions"]
        ]
    )


def _places_text(found: dict) -> str:
    head = f"{found['source']}:#{found['document']}  {found['metadata'].get('url') or found['metadata']['id']}"
    if found["held_out"]:
        return head + "\nheld out for validation: never trained on"
    if not found["places"]:
        return head + "\nnot read in this run"
    return "\n".join(
        [head]
        + [
            f"step {p['step']:>8}  row {p['row']:>6}  offset {p['offset']:>6}: {p['length']} tokens of it, from {p['start']}"
            for p in found["places"]
        ]
    )


if __name__ == "__main__":
    sys.exit(errors.run(main))
