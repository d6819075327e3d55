"""Scheduler: the one loop. Add requests, step, take what has moved.

add     a request           -> a Sequence that waits: prepared and laid out
step    one prefill (of the prompt that waits longest, or of some short ones of like length together), or one decode
        step of all sequences that run; they alternate, so that running answers never stand still for long
drop    nobody waits for this sequence any more

`generate` adds one request and steps to its end, `generate_batch` adds many, the server adds from its clients, parity
adds one whose sampler gives known tokens. A sequence decodes where its prefill wrote its KV cache; where sequences
have come or gone, the next step first gathers the rows of those that run.
"""

import time
from collections import abc, deque

import numpy as np

from hawk_trt.bundle import Bundle
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.inputs.processor import Processor
from hawk_trt.pruning import kept_count, query_of, select, weights_for
from hawk_trt.request import PruningConfig, Request, SamplingConfig, Timings
from hawk_trt.runtime.protocol import Backend, PrefillOutputs, StepOutputs, Visual
from hawk_trt.runtime.vision_cache import VisionCache
from hawk_trt.sequence import Sequence
from hawk_trt.stages import CPU

DEFAULT_MAX_NEW_TOKENS = 128
# Measured on two CPU cores (make bench-batching): up to 8 rows each answer takes less time, 16 brought nothing more.
DEFAULT_MAX_BATCH = 8
# Columns that a shared cache begins with and grows by: attention pays for all columns, a gathering for those in use.
ROOM = 64
# Prompts that wait are run together up to so many tokens, with so much more than their own for padding: 6 to 16 % less
# processor time was measured for 2 to 8 short ones. Longer ones gain less, and hold up the answers under way.
_JOINT_TOKENS = 1024
_MAX_PADDING = 1.25
_MB = 1_000_000


class Scheduler:
    """Runs requests on one backend. Not thread-safe, but for `prepare`, `waiting.append` and `drop`.

    waiting: prepared, in the order in which they came; none overtakes another.  running: rows of the next decode step.
    num_prefills, num_steps: run so far, of a prompt or of several together.  num_rows: of all decode steps together.
    """

    def __init__(
        self,
        bundle: Bundle,
        processor: Processor,
        vision: VisionCache,
        backend: Backend,
        *,
        max_batch: int = DEFAULT_MAX_BATCH,
        max_cache_bytes: int | None = None,
        room: int | None = None,
    ) -> None:
        """Start with nothing to do.

        max_batch bounds the rows of a decode step, max_cache_bytes the KV caches of all rows together; while rows are
        gathered, one tensor of one layer comes on top. room: columns for generated tokens that a KV cache begins with
        and grows by; None makes them all at once.
        """
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.max_cache_bytes = max_cache_bytes
        self.num_prefills = self.num_steps = self.num_rows = 0
        self._bundle, self._processor, self._vision, self._backend = bundle, processor, vision, backend
        self._max_batch = min(max_batch, backend.max_batch or max_batch)
        self._room = room if backend.max_context is None else None  # else its caches cannot grow
        self._column_bytes = bundle.manifest.kv_bytes_per_token
        # but for target cpu a step writes new states beside the old
        self._state_bytes = (1 if backend.target == CPU else 2) * bundle.manifest.state_bytes
        self._decode_next = False

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running)

    @property
    def cache_bytes(self) -> int:
        """Of the KV caches of all rows, as they lie in memory now."""
        return sum(sequence.row.nbytes for sequence in self.running if sequence.row is not None)

    def add(self, request: Request) -> Sequence:
        """Prepare a request and let it wait for its turn."""
        sequence = self.prepare(request)
        self.waiting.append(sequence)
        return sequence

    def prepare(self, request: Request) -> Sequence:
        """A request as a sequence that does not wait yet: milliseconds of work for a long prompt.

        Raises InvalidInput: something that cannot be used as given, or more KV cache than there may ever be.
        """
        started = time.perf_counter()
        manifest, chat, pruning = self._bundle.manifest, self._processor.chat, request.pruning or PruningConfig()
        inputs = self._processor(request)
        layout = self._processor.layout(inputs, query_of(pruning))
        sampling, sampler = request.sampling or SamplingConfig(), None
        highest = max(dict(sampling.logit_bias), default=0)
        if highest >= manifest.language.vocab_size:
            raise InvalidInput(f"logit_bias: got token {highest}, expected one below {manifest.language.vocab_size}")
        if not sampling.greedy or sampling.changes_logits:
            from hawk_trt.runtime.sampler import Sampler  # most requests take the most probable token

            sampler = Sampler(sampling, layout.input_ids).next_token
        max_kept = layout.num_tokens - layout.num_visual + kept_count(layout, pruning)
        limit = request.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        limit = min(limit, manifest.language.max_position_embeddings - layout.next_position)
        context = self._backend.max_context
        if context is not None:  # the answer also ends where the cache does; its last token is not cached
            if max_kept > context:
                raise InvalidInput(
                    f"KV cache: got {max_kept} tokens to keep, these engines hold {context}. Lower keep_ratio, or "
                    "rebuild with a larger --max-context: python -m engines"
                )
            limit = min(limit, context - max_kept + 1)
        sequence = Sequence(
            request=request,
            inputs=inputs,
            pruning=pruning,
            layout=layout,
            head_weights=weights_for(self._bundle, pruning),
            max_kept=max_kept,
            limit=limit,
            tokenizer=None if chat is None else chat.tokenizer,
            eos=manifest.special_tokens.eos,
            sampler=sampler,
        )
        # the CPU has the logits anyway, and they tell a broken run from an answer
        asked = request.return_logits or request.logprobs is not None
        sequence.need_logits = asked or sampler is not None or self._backend.device == "cpu"
        if not self._within_bound(needed := self._bytes([sequence])):
            raise InvalidInput(
                f"prompt: got {max_kept} tokens kept and up to {limit} to generate, {needed / _MB:.1f} MB of KV cache; "
                f"expected at most {(self.max_cache_bytes or 0) / _MB:.1f} MB. Lower keep_ratio or max_new_tokens, or "
                "raise max_cache_mb"
            )
        sequence.started = started
        sequence.timings.preprocess = time.perf_counter() - started
        return sequence

    def drop(self, sequence: Sequence) -> None:
        """Let a sequence go before the next step; its memory comes back when the others are gathered."""
        sequence.dropped = True

    def step(self) -> list[Sequence]:
        """Run one prefill or one decode step.

        Returns the sequences that it moved: each has a new `piece`, perhaps empty, has finished, or has its `error`.
        """
        self._leave()
        sequences = [] if self._decode_next and self.running else self._next_prompts()
        self._decode_next = bool(sequences)
        moved = self._prefill(sequences) if sequences else self._decode()
        self._leave()
        return moved

    def _leave(self) -> None:
        for sequence in [sequence for sequence in list(self.waiting) if sequence.dropped]:
            self.waiting.remove(sequence)
        for sequence in self.running:
            if sequence.finished and sequence.row is not None:
                sequence.row.release()
                sequence.row = None
        self.running = [sequence for sequence in self.running if not sequence.finished]

    def _next_prompts(self) -> list[Sequence]:
        """What the next prefill runs: the first that waits, and those right behind it that lose little by joining."""
        taken: list[Sequence] = []
        for sequence in list(self.waiting):
            lengths = [other.layout.num_tokens for other in (*taken, sequence)]
            padded = len(lengths) * max(lengths)
            alike = padded <= min(_JOINT_TOKENS, sum(lengths) * _MAX_PADDING)
            if taken and not (alike and np.array_equal(sequence.head_weights, taken[0].head_weights)):
                break
            if not self._fits([*taken, sequence]):
                break
            taken.append(sequence)
        for _ in taken:
            self.waiting.popleft()
        return taken

    def _fits(self, more: abc.Sequence[Sequence]) -> bool:
        """Whether these can run beside those that run."""
        rows = [*self.running, *more]
        context, places = self._backend.max_context, self._backend.max_start
        if len(rows) > self._max_batch or (places is not None and len(more) > places):
            return False
        # run together, the shorter are padded to the longest
        columns = max(sequence.max_kept for sequence in more) + max(sequence.limit for sequence in more) - 1
        if context is not None and columns > context:
            return False
        return self._within_bound(self._bytes(rows))

    def _bytes(self, rows: abc.Sequence[Sequence]) -> int:
        """Of the caches of these rows at their longest, side by side."""
        columns = max(sequence.max_columns for sequence in rows)
        return len(rows) * (columns * self._column_bytes + self._state_bytes)

    def _within_bound(self, cache_bytes: int) -> bool:
        return self.max_cache_bytes is None or cache_bytes <= self.max_cache_bytes

    def _prefill(self, sequences: list[Sequence]) -> list[Sequence]:
        """Run prompts together; where that fails each alone, since one's fault is no other's."""
        try:
            if self.running and not self._within_bound(self.cache_bytes + self._bytes(sequences)):
                self._gather()  # the memory of rows that have left
            visual, outputs = self._run_prompts(sequences)
        except Exception as error:  # whatever a caller's selector or a fault of ours raises must not end other answers
            if len(sequences) == 1:
                sequences[0].error = error
                return sequences
            return [moved for sequence in sequences for moved in self._prefill([sequence])]
        for number, sequence in enumerate(sequences):
            sequence.row = outputs.rows[number]
            self._advance(sequence, outputs.step, number, visual)
        self.running += sequences
        return sequences

    def _run_prompts(self, sequences: abc.Sequence[Sequence]) -> tuple[Visual, PrefillOutputs]:
        """Vision, selection, first_layer and decoder over the prompts, into a new KV cache."""
        self.num_prefills += 1
        begun = time.perf_counter()
        visual, cached = self._vision.encode([(s.inputs, s.layout) for s in sequences])
        encoded = time.perf_counter()
        prompts = [(sequence.layout, sequence.pruning) for sequence in sequences]
        inputs, scores, select_seconds = select(prompts, self._bundle, self._backend, visual)
        steps = max(sequence.limit for sequence in sequences) - 1
        columns = inputs.num_kept_total + (steps if self._room is None else min(steps, self._room))
        prepared = time.perf_counter()
        # the first logits are looked at in any case: they tell a broken run from an answer
        outputs = self._backend.prefill(inputs, visual, columns, logits=True)
        for row, sequence in enumerate(sequences):
            sequence.num_cached = cached[row]
            sequence.kept = outputs.kept_indices[row, inputs.kv_start[row] :] - inputs.pads[row]
            sequence.scores = outputs.scores[row][inputs.source_rows[row] >= 0] if scores is None else scores[row]
            sequence.timings = Timings(
                preprocess=sequence.timings.preprocess,
                vision=encoded - begun,
                select=select_seconds,
                first_layer=prepared - encoded - select_seconds + outputs.first_layer_seconds,
                decoder=outputs.decoder_seconds,
            )
        return visual, outputs

    def _decode(self) -> list[Sequence]:
        """Run one token of every row."""
        if not self.running:
            return []
        begun = time.perf_counter()
        rows = list(self.running)
        try:
            self._gather()
            tokens = np.array([sequence.token_ids[-1] for sequence in rows], np.int64)
            positions = np.array([sequence.position for sequence in rows], np.int64)
            logits = any(sequence.need_logits for sequence in rows)
            outputs = self._backend.decode([s.row for s in rows if s.row is not None], tokens, positions, logits=logits)
        except Exception as error:  # the rows of a step share its fate; those that wait do not
            for sequence in rows:
                sequence.error = error
            return rows
        seconds = time.perf_counter() - begun
        self.num_steps += 1
        self.num_rows += len(rows)
        moved = [sequence for sequence in rows if not sequence.finished]
        for row, sequence in enumerate(rows):
            if not sequence.finished:
                sequence.timings.decode += seconds
                self._advance(sequence, outputs, row)
        return moved

    def _advance(self, sequence: Sequence, outputs: StepOutputs, row: int, visual: Visual | None = None) -> None:
        """Give a sequence its row of a step; numbers that are not finite end that sequence alone."""
        try:
            sequence.step(int(outputs.next_token[row]), None if outputs.logits is None else outputs.logits[row])
        except BackendError as error:
            from hawk_trt.runtime.not_finite import first_not_finite

            assert sequence.row is not None
            where = first_not_finite(visual, sequence.row, self._bundle.manifest.language)
            sequence.error = BackendError(f"{error}. {where}")

    def _gather(self) -> None:
        """Bring the rows of all that run together, with room for a column more."""
        length = max(sequence.columns for sequence in self.running) + 1
        columns = min(length + (self._room or ROOM), max(sequence.max_columns for sequence in self.running))
        self._backend.gather([s.row for s in self.running if s.row is not None], length, columns)
