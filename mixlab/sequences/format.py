"""How documents become rows of a fixed length, and which tokens are attended to and trained on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FormatConfig:
    """The rules of a sequence format. Every choice is explicit; the defaults isolate documents from one another.

    kind: the builder of rows. "concat_chunk": documents end to end, cut every `sequence_length` tokens, the last partial
        row of an epoch dropped.
    bos, eos: put the tokenizer's beginning/end token before/after every document. They are added when a row is read;
        the token store holds text alone.
    mask_documents: attention stays within a document. Off: over the whole row, across documents (as OLMo 2 trains).
    restart_positions: positions count from 0 in every document of a row, not from the row's start.
    mask_repetitions: a row in which up to 13 tokens repeat 32 times or more in a row bears no loss (the instance filter of
        OLMo 2, section 2.4.1); it is read and counted all the same.
    loss_across_documents: the last token of one document is trained to predict the first of the next (BOS, when there is
        one). Off: that position bears no loss.
    """

    kind: str = "concat_chunk"
    bos: bool = False
    eos: bool = True
    mask_documents: bool = True
    restart_positions: bool = True
    loss_across_documents: bool = False
    mask_repetitions: bool = False

    def problems(self, where: str) -> list[str]:
        if self.kind != "concat_chunk":
            return [f"{where}.kind = {self.kind!r} is not a sequence format; use 'concat_chunk'"]
        if not (self.bos or self.eos) and not self.mask_documents:
            return [
                f"{where}: with bos, eos and mask_documents all off nothing marks where a document ends; turn one on"
            ]
        return []
