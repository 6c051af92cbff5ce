"""Keeps what each open sequence has produced, so that another shard can continue it with exactly the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from serving.engine.request import Submission


@dataclass(slots=True)
class JournalEntry:
    submission: Submission                                  # as first made, without a journal
    output_token_ids: list[int] = field(default_factory=list)


class Journal:
    """Holds one router's open sequences: no more than admission lets in."""

    def __init__(self) -> None:
        self._entries: dict[str, JournalEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, submission: Submission) -> None:
        if submission.request_id in self._entries:
            raise ValueError(f"request {submission.request_id} is in the journal already: ids must differ")
        self._entries[submission.request_id] = JournalEntry(
            replace(submission, journal_token_ids=()), list(submission.journal_token_ids))

    def append(self, request_id: str, token_ids: Sequence[int]) -> None:
        self._entries[request_id].output_token_ids += token_ids

    def resubmission(self, request_id: str) -> Submission:
        """Return the sequence as any shard can take it up now: its tokens so far are computed there, not drawn again.

        Log-probabilities of the prompt come with the first token, so they are asked for only until then.
        """
        entry = self._entries[request_id]
        return replace(entry.submission, journal_token_ids=tuple(entry.output_token_ids),
                       num_prompt_logprobs=None if entry.output_token_ids else entry.submission.num_prompt_logprobs)

    def rename(self, request_id: str, new_id: str) -> None:
        """Go on with a sequence under another id."""
        entry = self._entries[new_id] = self._entries.pop(request_id)
        entry.submission = replace(entry.submission, request_id=new_id)

    def close(self, request_id: str) -> Sequence[int]:
        """Forget a sequence that has ended, and return its output."""
        return self._entries.pop(request_id).output_token_ids
