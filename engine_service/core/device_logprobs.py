"""Log-probabilities of sampled tokens on the device, from their launch to the messages' rows.

Knows rows of raw logits and what was asked for each; of the device, one block of 32-bit results.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine_service.core.messages import Logprobs, Sampling
from penstock.engine_service.core.upload import Upload
from penstock.kernels import sampling

Int32s = NDArray[np.int32]


class DeviceLogprobs:
    """What N rows asked for: their `logprobs` best tokens each, or exactly their `logprob_token_ids`.

    The results are int32 or float32 by their bits: log-probability, rank, and the best ids and their
    log-probabilities of each row [N, num_best], then the log-probabilities of all listed ids in turn.
    """

    def __init__(self, asked: list[tuple[int, Sampling]], vocab_size: int, upload: Upload) -> None:
        self._asked = asked
        self._listed = [row.logprob_token_ids for _, row in asked]
        wanted = [
            0 if listed else row.logprobs or 0 for listed, (_, row) in zip(self._listed, asked, strict=True)
        ]
        self._wanted = [min(count, vocab_size) for count in wanted]
        self._num_best = max(self._wanted)
        self._num_listed = sum(len(listed) for listed in self._listed)
        self._rows = upload.add(np.array([row for row, _ in asked]))
        sizes = [len(listed) for listed in self._listed]
        self._pairs = (
            upload.add(np.repeat([row for row, _ in asked], sizes)),
            upload.add(np.repeat(np.arange(len(asked)), sizes)),
            upload.add(np.array([token for listed in self._listed for token in listed], np.int32)),
        )
        self._upload = upload

    @property
    def size(self) -> int:
        """Elements of the results."""
        return len(self._asked) * (2 + 2 * self._num_best) + self._num_listed

    def launch(self, logits: Tensor, ids: Tensor, out: Tensor) -> None:
        """Writes the results for the tokens ids [R] of raw logits [R, V] to out int32 [size]; never waits."""
        count, best = len(self._asked), self._num_best
        rows = self._upload.tensor(self._rows)
        tokens = ids.index_select(0, rows)
        logprobs, ranks, normalizers = sampling.row_logprobs(logits, rows, tokens)
        columns = out[: count * (2 + 2 * best)].view(2 + 2 * best, count)
        columns[0].view(torch.float32).copy_(logprobs)
        columns[1].copy_(ranks)
        if best:
            values, best_ids = sampling.best_of(logits.index_select(0, rows).to(torch.float32), best)
            columns[2 : 2 + best].copy_(best_ids.t())
            columns[2 + best :].view(torch.float32).copy_((values - normalizers.unsqueeze(-1)).t())
        if self._num_listed:
            listed_rows, places, listed = (self._upload.tensor(part) for part in self._pairs)
            values = logits[listed_rows, listed].to(torch.float32) - normalizers.index_select(0, places)
            out[columns.numel() :].view(torch.float32).copy_(values)

    def collect(self, results: Int32s) -> dict[int, Logprobs]:
        """One-row messages by row, from the results [size] on the host."""
        count, best = len(self._asked), self._num_best
        columns = results[: count * (2 + 2 * best)].reshape(2 + 2 * best, count)
        numbers = columns.view(np.float32)
        listed_logprobs = results[columns.size :].view(np.float32).tolist()
        found, start = {}, 0
        for place, ((row, _), listed, wanted) in enumerate(
            zip(self._asked, self._listed, self._wanted, strict=True)
        ):
            ids = listed or columns[2 : 2 + wanted, place].tolist()
            alternatives = numbers[2 + best : 2 + best + wanted, place].tolist()
            if listed:
                alternatives = listed_logprobs[start : start + len(listed)]
                start += len(listed)
            found[row] = Logprobs(
                logprobs=[float(numbers[0, place])],
                ranks=[int(columns[1, place])],
                num_alternatives=len(ids),
                alternative_ids=list(ids),
                alternative_logprobs=alternatives,
            )
        return found
