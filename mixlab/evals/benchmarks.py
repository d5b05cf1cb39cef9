"""Scores of benchmarks (evals/tasks.py) while a model is trained, or afterwards: accuracies, and bits per byte of the right
answer, which tells small models apart long before their accuracy leaves chance.

Every metric is the mean of one number an item. All processes ask all items, each computes its rows of batches of fixed shapes.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mixlab.config import Config
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.data import Data
from mixlab.errors import UserError
from mixlab.evals.generate import until
from mixlab.evals.probing import ProbedModel
from mixlab.evals.tasks import Item, Task, TaskConfig, open_tasks
from mixlab.inject.analysis.choices import chosen
from mixlab.inject.cloze import pairs

LN2 = float(np.log(2))
UNCONDITIONAL = "Answer:"  # what a choice stands after where its question is left out
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Scored(NamedTuple):
    """metrics: eval/<task>/<metric>, each with <metric>_se, and eval/<task>/items.
    items: "<task>/<metric>" -> float64 [items], and "<task>/id" -> the items' names [items]."""

    metrics: dict[str, float]
    items: dict[str, np.ndarray]


class Benchmarks:
    """tasks: by name.   texts: how they are written in tokens."""

    def __init__(self, tasks: Mapping[str, "Asked"], texts: Tokenizer):
        self.tasks, self._texts = tasks, texts

    def scores(self, model: ProbedModel, names: Collection[str]) -> Scored:
        """Of the tasks `names`: eval/<task>/{acc, acc_per_char, acc_per_byte, bits_per_byte} of choices (and acc_uncond where it
        is the task's score), {acc, bits_per_byte} of continuations, {exact_match, bits_per_byte} of written answers; all
        have a score, which is the one of them that stands for the task. Where all tasks are scored, and there are several, also
        eval/tasks/score, their mean. Standard errors are those of a mean over items."""
        metrics: dict[str, float] = {}
        items: dict[str, np.ndarray] = {}
        for name in names:
            task = self.tasks[name]
            found = {metric: np.asarray(values, np.float64) for metric, values in self._ask(task, model).items()}
            found = {"score": found[task.config.score]} | found
            items |= {f"{name}/{metric}": values for metric, values in found.items()}
            items[f"{name}/id"] = np.array([item.name for item in task.items])
            for metric, values in found.items():
                metrics[f"eval/{name}/{metric}"], metrics[f"eval/{name}/{metric}_se"] = mean(values)
            metrics[f"eval/{name}/items"] = len(task.items)
        if len(self.tasks) > 1 and set(names) == set(self.tasks):
            metrics["eval/tasks/score"] = float(np.mean([metrics[f"eval/{name}/score"] for name in names]))
            errors = [metrics[f"eval/{name}/score_se"] for name in names]
            metrics["eval/tasks/score_se"] = float(np.sqrt(np.sum(np.square(errors))) / len(errors))
        return Scored(metrics, items)

    def _ask(self, task: "Asked", model: ProbedModel) -> dict[str, Sequence[float] | np.ndarray]:
        """Metric -> a number for each item."""
        sums, likeliest = model.totals(task.contexts, task.targets)
        ends = np.cumsum([len(item.targets) for item in task.items])
        golds = [item.gold for item in task.items]
        gold = ends - [len(item.targets) for item in task.items] + golds
        right = [item.targets[item.gold][1:] for item in task.items]
        bits = {"bits_per_byte": -sums[gold] / LN2 / [len(text.encode()) for text in right]}
        if task.config.format == "continuation":
            return {"acc": likeliest[gold]} | bits
        if task.config.format == "generation":
            return {"exact_match": self._write(task, model)} | bits
        texts = [target[1:] for item in task.items for target in item.targets]
        found = {
            "acc": sums,
            "acc_per_char": sums / [len(text) for text in texts],
            "acc_per_byte": sums / [len(text.encode()) for text in texts],
        }
        if task.bare:
            found["acc_uncond"] = sums - model.totals(task.bare, task.targets)[0]
        return {
            metric: [chosen(scores) == gold for scores, gold in zip(np.split(values, ends[:-1]), golds, strict=True)]
            for metric, values in found.items()
        } | bits

    def _write(self, task: "Asked", model: ProbedModel) -> list[bool]:
        written = model.greedy(task.contexts, task.config.new_tokens)
        texts = [self._texts.decode(until(tokens, self._texts.eos_id)) for tokens in written]
        return [
            is_right(text, item.answer or "", task.config.stops) for text, item in zip(texts, task.items, strict=True)
        ]


def open_benchmarks(config: Config, data: Data) -> Benchmarks:
    """The benchmarks of a run. Prompts begin with BOS where documents did, at the end of training.
    Raises UserError, all problems at once: files that cannot be used, names that sets of held-out documents have, and what
    `Asked.of` raises."""
    texts, template, longest = data.tokenizer, config.metadata_template, config.model.context_length
    before = np.array([texts.bos_id] if data.stream.stages[-1].format.bos else [], np.int32)
    tasks, problems = open_tasks(config.evaluation.tasks, data.held_out)
    asked = {}
    for task in tasks:
        value = task.config.metadata
        said = [] if value is None or template is None else texts.encode(template.text(value))
        try:
            asked[task.name] = Asked.of(task, texts, np.concatenate([before, np.asarray(said, np.int32)]), longest)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("the benchmarks cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return Benchmarks(asked, texts)


class Asked(NamedTuple):
    """The items of a task, and in tokens the contexts and targets of all their options, one after the other.
    bare: what the targets stand after without their questions; empty where the task does not ask for that."""

    config: TaskConfig
    items: list[Item]
    contexts: list[np.ndarray]
    targets: list[np.ndarray]
    bare: list[np.ndarray]

    @classmethod
    def of(cls, task: Task, tokenizer: Tokenizer, prefix: np.ndarray, longest: int) -> "Asked":
        """prefix: in front of every context.   longest: tokens of the model's context; items with a longer answer are left out.
        UserError where none is left."""
        counts = [len(item.targets) for item in task.items]
        texts = [target for item in task.items for target in item.targets]
        contexts, targets = _encode(
            tokenizer, [context for item in task.items for context in item.contexts], texts, prefix
        )
        ends = np.cumsum(counts)
        fits = [max(map(len, targets[end - count : end])) <= longest for end, count in zip(ends, counts, strict=True)]
        items = [item for item, fitting in zip(task.items, fits, strict=True) if fitting]
        if not items:
            raise UserError(
                f"evaluation.tasks.{task.name}: every item has an answer of more than {longest} tokens, the model's context; leave it out"
            )
        kept = np.flatnonzero(np.repeat(fits, counts)).tolist()
        bare = []
        if task.config.normalisation == "unconditional":
            alone = np.concatenate([prefix, tokenizer.encode(UNCONDITIONAL)]).astype(np.int32)
            bare = [alone] * len(kept)
        return cls(task.config, items, [contexts[k] for k in kept], [targets[k] for k in kept], bare)


def _encode(
    tokenizer: Tokenizer, contexts: list[str], targets: list[str], prefix: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """As `pairs`, every context with the prefix in front; one that is empty then is EOS, which a document follows too."""
    before, after = pairs(tokenizer, contexts, targets)
    whole = {
        id(tokens): np.concatenate([prefix, tokens]) for tokens in before
    }  # options of an item share their context
    nothing = np.array([tokenizer.eos_id], np.int32)
    return [whole[id(tokens)] if len(whole[id(tokens)]) else nothing for tokens in before], after


def is_right(text: str, answer: str, stops: Sequence[str]) -> bool:
    """Whether the text, up to the first of `stops`, says the answer: its last number is, where the answer is a number; else all
    of it is the answer, whatever the case."""
    for stop in stops:
        text = text.partition(stop)[0]
    if NUMBER.fullmatch(answer):
        numbers = NUMBER.findall(text)
        return bool(numbers) and float(numbers[-1].replace(",", "")) == float(answer.replace(",", ""))
    return text.strip().casefold() == answer.casefold()


def mean(values: np.ndarray) -> tuple[float, float]:
    """(mean, its standard error): the deviation with n - 1 over the root of n; NaN for a single item."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
