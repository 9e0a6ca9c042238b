"""The bodies of the hooks on scheduler and batch: they take values out of SGLang's objects for the observer. Written for
0.5; what an older release does otherwise is a method of its own, which `sglang046` replaces. Nothing here may change an
object of the server's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from labprobe.observer import Observer, now

MODES = {"EXTEND": "prefill", "DECODE": "decode", "MIXED": "mixed", "IDLE": "idle"}


class Bodies:
    """Around `Scheduler`, `SchedulePolicy` and `ScheduleBatch`. `start` opens the file once there is a scheduler."""

    def __init__(self, observer: Observer, start: Callable[[object], None]) -> None:
        self.o = observer
        self._start = start
        self._first_pass: set[object] = set()

    # ------------------------------------------------------------ what releases differ in

    def formed(self, scheduler: object, result: object) -> tuple[object, object]:
        """The batch to run, or None, and the running batch."""
        return result.batch_to_run, result.running_batch

    def forward(self, scheduler: object, batch: object) -> int | None:
        """The number of a batch's forward pass; None where a batch whose result comes does not know it."""
        return batch.forward_iter

    def prompt_tokens(self, batch: object, at: int) -> tuple[int, int]:
        """New and cached prompt tokens of a prefill batch, as the server's log counts them; its prompts end at `at`."""
        stats = batch.prefill_stats
        if stats is None:
            return sum(batch.extend_lens[:at]), 0
        return stats.log_input_tokens, stats.log_hit_tokens

    def output_tokens(self, req: object) -> int:
        return len(req.output_ids_through_stop)

    def retractions(self, req: object) -> int | None:
        return req.retraction_count

    def retracted(self, result: object) -> tuple[Sequence[object], Sequence[object]]:
        """Requests put back, and requests given up."""
        return result[0], result[2]

    # ------------------------------------------------------------ start

    def begin(self, *args: object, **kwargs: object) -> None:
        return None

    def created(
        self, token: object, result: object, scheduler: object, *args: object, **kwargs: object
    ) -> None:
        self._start(scheduler)

    # ------------------------------------------------------------ batches

    def form_ends(
        self, start: int, result: object, scheduler: object, *args: object, **kwargs: object
    ) -> None:
        batch, running = self.formed(scheduler, result)
        if batch is None:
            self.o.form_ends(start, found=False, running=0, waiting=0)
            return
        self.o.form_ends(start, found=True, running=len(running.reqs), waiting=len(scheduler.waiting_queue))

    def run_ends(
        self, start: int, result: object, scheduler: object, batch: object, *args: object, **kw: object
    ) -> None:
        reqs = batch.reqs
        name = batch.forward_mode._name_  # `name` goes through a descriptor in Python, on every batch
        mode = MODES.get(name, name)
        new, cached, forward = len(reqs), 0, scheduler.forward_ct
        if mode in ("prefill", "mixed"):
            prompts = len(reqs) - len(batch.decoding_reqs or ())
            new, cached = self.prompt_tokens(batch, prompts)
            if self.o.requests:
                self._scheduled(batch, prompts, forward)
        chunked = batch.chunked_req is not None and mode != "decode"
        self.o.run_ends(
            start, forward=forward, mode=mode, requests=len(reqs), new=new, cached=cached, chunked=chunked
        )

    def _scheduled(self, batch: object, prompts: int, forward: int) -> None:
        """One event a prompt; of the second and later parts of a prompt nothing was cached, it was computed before."""
        parts = zip(batch.reqs[:prompts], batch.prefix_lens, batch.extend_lens, strict=False)
        goes_on = self.o.chunked_rids
        for req, prefix, new in parts:
            cached = 0 if req.rid in goes_on else prefix
            more = req is batch.chunked_req
            (goes_on.add if more else goes_on.discard)(req.rid)
            self.o.put(("scheduled", now(), req.rid, forward, int(cached), int(new), more))

    def done_begins(
        self, scheduler: object, batch: object, *args: object, **kwargs: object
    ) -> tuple[object, ...]:
        if not self.o.requests or batch.reqs is None:
            return self.o.done_begins(), (), ()
        alive = [req for req in batch.reqs if req.finished_reason is None]
        new = [req for req in alive if not len(req.output_ids)] if batch.forward_mode.is_extend() else ()
        return self.o.done_begins(), alive, new

    def done_ends(
        self,
        token: tuple[object, ...],
        result: object,
        scheduler: object,
        batch: object,
        *args: object,
        **kw: object,
    ) -> None:
        start, alive, new = token
        if batch.reqs is None:  # a result without a batch, which starts the overlap loop
            self.o.result_ends()
            return
        forward = self.o.done_ends(start, forward=self.forward(scheduler, batch))
        for req in new:
            if len(req.output_ids):
                self.o.put(("first_token", now(), req.rid, forward))
        for req in alive:
            if req.finished_reason is not None:
                self._finished(req, forward)

    def _finished(self, req: object, forward: int | None) -> None:
        reason = req.finished_reason.to_json()["type"]
        prompt, output = len(req.origin_input_ids), self.output_tokens(req)
        if reason == "abort":
            self.o.put(("aborted", now(), req.rid, "running", prompt, output, req.cached_tokens))
            return
        counts = (prompt, output, req.cached_tokens, self.retractions(req))
        self.o.put(("finished", now(), req.rid, forward, reason, *counts))

    # ------------------------------------------------------------ order, retraction, flush

    def order_begins(self, policy: object, waiting: object, *args: object, **kwargs: object) -> None:
        if self._ours(policy):
            self.o.policy = policy._determine_active_policy(waiting).value
            self.o.why_match = "policy"

    def order_ends(
        self, token: object, result: object, policy: object, *args: object, **kwargs: object
    ) -> None:
        if self._ours(policy):
            self.o.why_match = "schedule"

    def _ours(self, policy: object) -> bool:
        return id(policy.tree_cache) in self.o.trees

    def retract_begins(self, batch: object, *args: object, **kwargs: object) -> tuple[int, int]:
        return now(), self.o.pools.free_and_evictable()[0]

    def retract_ends(self, token: tuple[int, int], result: object, *args: object, **kwargs: object) -> None:
        start, before = token
        back, given_up = self.retracted(result)
        free, evictable = self.o.pools.free_and_evictable()
        prompt = sum(len(req.origin_input_ids) for req in back)
        output = sum(len(req.output_ids) for req in back)
        numbers = (len(back), len(given_up), free - before, prompt, output, now() - start, free, evictable)
        self.o.put(("retraction", now(), *numbers))
        if self.o.requests:
            for req in back:
                self.o.put(("retracted", now(), req.rid, len(req.origin_input_ids), len(req.output_ids)))
            for req in given_up:
                self._aborted(req, "retraction")

    def flushed(self, token: object, result: object, *args: object, **kwargs: object) -> None:
        self.o.put(("flush", now(), bool(result)))

    # ------------------------------------------------------------ requests

    def arrives(self, scheduler: object, recv: object, *args: object, **kwargs: object) -> None:
        """Noted before the call, which queues the request."""
        limit = getattr(recv.sampling_params, "max_new_tokens", None)
        self.o.put(("arrived", now(), recv.rid, len(recv.input_ids or ()), limit))

    def ends(self, *args: object, **kwargs: object) -> None:
        return None

    def queue_begins(self, scheduler: object, *args: object, **kwargs: object) -> list[object]:
        return list(scheduler.waiting_queue)

    def queue_ends(
        self,
        before: list[object],
        result: object,
        scheduler: object,
        req: object,
        *args: object,
        **kwargs: object,
    ) -> None:
        queue = scheduler.waiting_queue
        if queue and queue[-1] is req:
            again = bool(len(req.output_ids)) or bool(args and args[0]) or bool(kwargs.get("is_retracted"))
            self.o.put(("queued", now(), req.rid, again, len(queue)))
        else:
            self._aborted(req, "queue")
        if len(queue) < len(before) + 1:
            self._gone(before, queue)

    def abort_ends(
        self, before: list[object], result: object, scheduler: object, *args: object, **kwargs: object
    ) -> None:
        self._gone(before, scheduler.waiting_queue)

    def _gone(self, before: list[object], after: list[object]) -> None:
        kept = set(map(id, after))
        for req in before:
            if id(req) not in kept:
                self._aborted(req, "waiting")

    def _aborted(self, req: object, where: str) -> None:
        prompt, output = len(req.origin_input_ids), len(req.output_ids)
        self.o.put(("aborted", now(), req.rid, where, prompt, output, req.cached_tokens))
