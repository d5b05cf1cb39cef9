"""How documents become rows of a fixed length, and which tokens are attended to and trained on."""

from dataclasses import dataclass
from typing import Literal

from mixlab.sequences.decompose import Variant
from mixlab.sequences.metadata import MetadataConfig

OWN_KEYS = {
    "concat_chunk": (),
    "complete": (),
    "best_fit": ("long_documents",),
    "decompose": ("variant", "min_length"),
}
# Choices added later, with what was done before there was one: where it still is, they are not part of what is read.
BEFORE = {"targets_past_row": True, "metadata": None, "loss_normaliser": "tokens"}


@dataclass(frozen=True)
class FormatConfig:
    """The rules of a sequence format. Every choice is explicit; the defaults isolate documents from one another.

    kind: the builder of rows. "concat_chunk": documents end to end, cut every `sequence_length` tokens, the last partial
        row of an epoch dropped. "complete": every row begins with a document; what does not fit at its end is dropped
        (Gao et al. 2025). "best_fit": whole documents, packed with little padding. "decompose": every document cut
        on its own into pieces of powers of two, rows of `sequence_length` tokens at most; a step reads rows of one length.
    long_documents: with "best_fit", "split" documents longer than a row, or "truncate" them.
    variant, min_length: with "decompose", how pieces follow one another (see decompose.py), and tokens of the shortest row.
    bos, eos: put the tokenizer's beginning/end token before/after every document. They are added when a row is read;
        the token store holds text alone.
    mask_documents: attention stays within a document. Off: over the whole row, across documents (as OLMo 2 trains).
    restart_positions: positions count from 0 in every document of a row, not from the row's start.
    mask_repetitions: a row in which up to 13 tokens repeat 32 times or more in a row bears no loss (the instance filter of
        OLMo 2, section 2.4.1); it is read and counted all the same.
    loss_across_documents: the last token of one document is trained to predict the first of the next (BOS, when there is
        one). Off: that position bears no loss.
    targets_past_row: the last position of a row is trained to predict the document's next token, which is in no row or in
        another. Off: it bears no loss (as OLMo-core trains). In "complete" rows it never does: that token is dropped.
    metadata: what stands before every document, such as its URL; None for nothing (see metadata.py).
    loss_normaliser: "tokens": every trained token of a batch weighs the same. "rows": every row does, and a token the less,
        the more of its row are trained (mean of the rows' means; Gao et al. 2025).
    """

    kind: Literal["concat_chunk", "complete", "best_fit", "decompose"] = "concat_chunk"
    bos: bool = False
    eos: bool = True
    mask_documents: bool = True
    restart_positions: bool = True
    loss_across_documents: bool = False
    mask_repetitions: bool = False
    targets_past_row: bool = True
    long_documents: Literal["split", "truncate"] = "split"
    variant: Variant = "released"
    min_length: int = 256
    metadata: MetadataConfig | None = None
    loss_normaliser: Literal["tokens", "rows"] = "tokens"

    @property
    def predicts_past_row(self) -> bool:
        """The last position of a row has a target."""
        return self.targets_past_row and self.kind != "complete"

    @property
    def cut_once(self) -> bool:
        """Rows are made once of the whole source, and read in another order in every epoch; else anew in each."""
        return self.kind in ("best_fit", "decompose")

    def cut(self, sequence_length: int) -> tuple:
        """What decides how documents are cut into rows; formats of equal cuts read on in each other's rows."""
        own: tuple = tuple(getattr(self, key) for key in OWN_KEYS[self.kind])
        if self.metadata is not None:
            own += (self.metadata.identity(),)
        return (self.kind, self.bos, self.eos, sequence_length, *own)

    def identity(self) -> dict:
        """Everything that decides what is read; left out is what does not: other kinds' keys,
        and a choice that is as it was before there was one."""
        left_out = {key for kind, keys in OWN_KEYS.items() if kind != self.kind for key in keys}
        left_out |= {key for key, value in BEFORE.items() if getattr(self, key) == value}
        found = {key: value for key, value in vars(self).items() if key not in left_out}
        return found if self.metadata is None else found | {"metadata": self.metadata.identity()}

    def problems(self, where: str) -> list[str]:
        found = [] if self.metadata is None else self.metadata.problems(f"{where}.metadata")
        if not (self.bos or self.eos) and not self.mask_documents and self.kind != "decompose":
            found.append(
                f"{where}: with bos, eos and mask_documents all off nothing marks where a document ends; turn one on"
            )
        return found
