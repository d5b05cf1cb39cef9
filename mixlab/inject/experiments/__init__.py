"""What can be tried within a run: a module a kind of experiment.

Each is a frozen dataclass of settings whose first field is its `kind`, with
    problems(where) -> what is wrong with the settings by themselves; `where` is their key.
    groups(material) -> what is inserted.   probes(material) -> how the model is looked at.
Some have more: `noise`, `decide` and `groups_of`, `kept_out` and `objections` (see watermark.py, knowledge.py, verbatim.py).
All are functions of settings and material alone.
"""

from mixlab.inject.experiments.canaries import Canaries
from mixlab.inject.experiments.contamination import Contamination
from mixlab.inject.experiments.forgetting import Forgetting
from mixlab.inject.experiments.iid import Iid
from mixlab.inject.experiments.knowledge import Knowledge
from mixlab.inject.experiments.poisoning import Poisoning
from mixlab.inject.experiments.reasoning import Reasoning
from mixlab.inject.experiments.repetition import Repetition
from mixlab.inject.experiments.texts import Texts
from mixlab.inject.experiments.verbatim import Verbatim
from mixlab.inject.experiments.watermark import Watermark

Experiment = (
    Canaries
    | Contamination
    | Forgetting
    | Iid
    | Knowledge
    | Poisoning
    | Reasoning
    | Repetition
    | Texts
    | Verbatim
    | Watermark
)
