"""The training loop: sample episodes, turn rewards into advantages, update, push the weights, look how it goes.

The update of step n starts from version n - 1 of the weights and makes version n; where its episodes come from is
batches.py's business. The state of a run is the learner's state, the step and which questions were used, so a resumed run
goes on exactly.

With several processes each runs this very loop. They hold the same episodes and do the same arithmetic on their own shards;
what belongs to one of them alone (files, the terminal) is process 0's. How they agree is distributed.py's business.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from rollout.chat import load_tokenizer
from rollout.errors import UserError
from sqlrl_jax.allocator import share_devices
from sqlrl_jax.batches import Batch, Batches, SynchronousBatches, Watch
from sqlrl_jax.checkpoint import Checkpoints
from sqlrl_jax.config import Config
from sqlrl_jax.credit import learn
from sqlrl_jax.data.curriculum import go_on, question_order
from sqlrl_jax.data.gold import without_bad_golds
from sqlrl_jax.data.order import Supply, steps_per_epoch
from sqlrl_jax.data.questions import Questions, load_questions
from sqlrl_jax.display import Display, comparison, eval_line, step_line
from sqlrl_jax.distributed import World
from sqlrl_jax.episode_text import episode_text, pick
from sqlrl_jax.evaluate import evaluate
from sqlrl_jax.learner import Learner, build_learner
from sqlrl_jax.mesh import make_mesh
from sqlrl_jax.metrics import rollout_metrics
from sqlrl_jax.model.hf import save_hf
from sqlrl_jax.model.peft import save_peft
from sqlrl_jax.plan import correction, plan_rows
from sqlrl_jax.probing import Prober
from sqlrl_jax.report import write_report
from sqlrl_jax.rl.advantages import load_estimator
from sqlrl_jax.run import Decode, Run, open_run
from sqlrl_jax.shared_fleet import open_fleet
from sqlrl_jax.signals import kept, new_signals
from sqlrl_jax.stop import Stopped, StopSignal
from sqlrl_jax.streamed import StreamedBatches
from sqlrl_jax.weights import Pusher, PushError


def train(config: Config, world: World) -> int:
    """Runs or resumes the run that `config` describes. Returns the process's exit status."""
    if config.generator.backend == "embedded" and not config.generator.services:
        share_devices()  # with the service that this run starts
    world.require_same("configuration", config.model_dump_json(indent=1))
    with ExitStack() as stack:
        stop = StopSignal(world)
        stack.callback(stop.close)
        run = open_run(config, world)
        stack.callback(run.close)
        world.record(run.log)
        display = Display(run.log, quiet=not world.is_main)
        with world.ending_together():
            trainer = Trainer(config, world, run, display, stop, stack)
            try:
                trainer.loop()
            except Stopped as signal:
                trainer.save()
                display.print(
                    f"stopped by {signal} after step {trainer.step}; everything up to there is saved. Go on with:"
                )
                flags = " --coordinator … on every host, as before" if world.count > 1 else ""
                display.print(
                    f"    python launch.py --config {run.dir}/config.yaml trainer.resume_mode=latest{flags}",
                    style="bold",
                )
                return 130
            trainer.finish()
    return 0


class Trainer:
    """One run: its data, learner, services and the step it has reached."""

    def __init__(
        self, config: Config, world: World, run: Run, display: Display, stop: StopSignal, stack: ExitStack
    ) -> None:
        self.config, self.world, self.run, self.display, self.stop = config, world, run, display, stop
        self.estimator = load_estimator(config.trainer.algorithm.advantage_estimator)
        self.data = self._questions()
        self.total = self._total_steps()
        trainer = config.trainer
        world.connect(make_mesh(trainer.mesh))
        self.learner: Learner = build_learner(config, self.total)
        self.decode: Decode = load_tokenizer(trainer.policy.model.path).decode
        self.checkpoints = Checkpoints(
            run.checkpoints, trainer.max_ckpts_to_keep, trainer.keep_best_ckpt, self._exchange
        )
        stack.callback(self.checkpoints.close)
        self.order = question_order(self.data.train, trainer.train_batch_size, trainer.seed, config.data.order)
        self.supply = self._supply()
        self.step = self._restore()
        run.forget_after(self.step if self.step else -1)
        self.signals = [kept(metrics) for metrics in run.history("train")]
        self._plan()
        self.fleet = open_fleet(world, config, run.dir, display.print)
        stack.callback(self.fleet.close)
        self.pusher = Pusher(
            self.fleet.client,
            self.learner.model_config,
            config.generator.inference_engine.dtype,
            config.trainer.policy.model.lora,
            run_id=run.id,
            epoch=run.epoch,
            timeout=config.bridge.push_timeout,
            delta=config.bridge.delta == "auto",
            world=world,
        )
        self.prober = Prober(config, self.learner, self.data.val)
        self.fleet.republish = self.push
        self.watch = Watch(display.bar, stop.heed)
        source = StreamedBatches if trainer.max_staleness else SynchronousBatches
        self.batches: Batches = source(config, self.supply, self.fleet, self.watch)
        stack.callback(self.batches.close)
        self.writer = stack.enter_context(ThreadPoolExecutor(1, "writer"))
        self.push()

    def loop(self) -> None:
        """Trains to the last step. Raises Stopped between two phases after Ctrl-C or SIGTERM."""
        trainer, started, first = self.config.trainer, time.monotonic(), self.step
        while True:
            self.stop.check()
            if self._due(trainer.eval_interval):
                self._evaluate_all()
            if self.step > first and self._due(trainer.ckpt_interval):
                self.save()
            if self.step == self.total:
                return
            if self.step > first and trainer.hf_save_interval and self.step % trainer.hf_save_interval == 0:
                self.export(self.run.exports / f"step_{self.step}")
            metrics = self.train_step()
            if metrics is None:
                self.display.print(f"the questions of {trainer.epochs} epochs are used up after step {self.step}")
                self.total = self.step
                continue
            pace = (time.monotonic() - started) / (self.step - first)
            self.display.print(step_line(self.step, self.total, metrics, pace * (self.total - self.step)))

    def train_step(self) -> dict[str, float] | None:
        """One step: episodes, update, push. Returns and logs its metrics; None when no questions are left."""
        trainer, clock = self.config.trainer, Clock()
        batch = self.batches.take(self.step)
        if batch is None:
            return None
        clock.lap("rollout")
        written = self.writer.submit(
            self.run.log_episodes, "train", self.step + 1, batch.episodes, self.data.by_id, self.decode
        )
        metrics = self._update(batch)
        self.prober.see(batch.episodes)
        clock.lap("update")
        self.step += 1
        metrics |= self.push()
        self.batches.trained(batch)
        self.order.tell(batch.episodes)
        clock.lap("push")
        written.result()  # tens of seconds of a large batch, beside the update and the push
        clock.lap("log")
        metrics |= batch.metrics | clock.metrics() | self.fleet.idle_metrics()
        metrics["async/learner_idle"] = metrics["timing/rollout"] / metrics["timing/step"]
        playing = "step" if trainer.max_staleness else "rollout"
        metrics["generate/tokens_per_second"] = metrics["generate/tokens"] / metrics[f"timing/{playing}"]
        self.run.log_metrics("train", self.step, metrics)
        self._tell(metrics, batch)
        return metrics

    def _update(self, batch: Batch) -> dict[str, float]:
        """Trains on a batch: rewards, advantages, optimizer steps."""
        trainer = self.config.trainer
        usable = [e for e in batch.episodes if e.outcome != "prompt_too_long"]
        if not usable:
            raise UserError(
                f"step {self.step + 1}: every prompt is longer than trainer.max_prompt_length = {trainer.max_prompt_length}"
            )
        metrics = learn(self.learner, self.estimator, usable)
        metrics["generate/prompts_too_long"] = float(len(batch.episodes) - len(usable))
        return metrics | rollout_metrics(usable)

    def push(self) -> dict[str, float]:
        """Gives the present weights to every service as version `step`; a service that dies meanwhile is brought back."""
        probe = self.prober.probe()
        while True:
            try:
                return self.pusher.push(self.learner.state.params, self.step, probe)
            except PushError as error:
                if not error.transient:
                    raise
                self.fleet.bring_back(error.address, error)

    def evaluate(self, turns: int) -> None:
        """Measures the present weights on the evaluation questions with up to `turns` turns; prints and logs."""
        total = len(self.fleet.share(self.data.val)) * self.config.generator.eval_n_samples_per_prompt
        with self.display.bar("evaluating", total) as bar:
            episodes, metrics = evaluate(
                self.fleet, self.config, self.data.val, self.step, turns, self.watch.follow(bar)
            )
        metrics["max_turns"] = turns
        self.display.print(eval_line(self.step, turns, metrics), style="bold")
        if turns == self.config.generator.max_turns:
            self.run.log_episodes("eval", self.step, episodes, self.data.by_id, self.decode)
        self.run.log_metrics("eval", self.step, metrics)

    def save(self) -> None:
        """Saves everything a resumed run needs, as of the present step."""
        turns = self.config.generator.max_turns
        scores = self.world.from_main(
            "accuracy of this step",
            lambda: [
                m["eval/all/avg_score"]
                for m in self.run.history("eval")
                if (m["step"], m["max_turns"]) == (self.step, turns)
            ],
        )
        self.checkpoints.save(self.step, self.learner, scores[-1] if scores else None, self._data_state())

    def export(self, folder: Path) -> None:
        """Writes the present weights as a Hugging Face folder."""
        learner = self.learner
        save_hf(
            folder,
            learner.params,
            learner.model_config,
            tokenizer_source=learner.tokenizer_dir,
            exchange=self._exchange,
        )

    def _exchange(self, text: str) -> list[str]:
        return [data.decode() for data in self.world.exchange("checkpoint", text.encode())]

    def finish(self) -> None:
        """After the last step: one-turn accuracy, checkpoint, export, the before/after table, the report."""
        self.save()
        self.checkpoints.wait()
        self.export(self.run.export)
        learner = self.learner
        if learner.lora.rank:
            save_peft(
                self.run.adapter, learner.state.params, learner.model_config, learner.lora, base=learner.tokenizer_dir
            )
        if self.world.is_main:
            self._report()

    def _report(self) -> None:
        turns, learner, history = self.config.generator.max_turns, self.learner, self.run.history("eval")
        before = next(m for m in history if m["max_turns"] == turns)
        after = next(m for m in reversed(history) if m["max_turns"] == turns)
        columns = [(f"after (step {after['step']})", after)]
        if before["step"] < after["step"]:  # with trainer.eval_before_train
            columns.insert(0, (f"before (step {before['step']})", before))
        if turns > 1:
            columns.append(("after, one turn only", next(m for m in reversed(history) if m["max_turns"] == 1)))
        self.display.print(comparison(f"greedy, up to {turns} turns", columns))
        page = write_report(self.run.dir)
        adapter = f"adapter {self.run.adapter}\n" if learner.lora.rank else ""
        best = self.checkpoints.best()
        told = f"best    {self.run.checkpoints}/best: step {best[0]}, accuracy {best[1]:.3f}\n" if best else ""
        self.display.print(f"model   {self.run.export}\n{told}{adapter}report  {page}\nmetrics {self.run.metrics_file}")

    def _questions(self) -> Questions:
        """What is trained on and measured. Process 0 alone tries the gold queries, and tells the others what is left."""
        data = self.world.in_turn("data", lambda: load_questions(self.config))
        self.world.require_same("questions", "\n".join(data.by_id))
        record = self.run.dir / "dropped_questions.jsonl"
        left = self.world.from_main(
            "questions with good gold queries",
            lambda: [
                task.id for task in without_bad_golds(data.train, self.config, record, self.display.print, self.run.log)
            ],
        )
        kept = set(left)
        return replace(data, train=[task for task in data.train if task.id in kept])

    def _restore(self) -> int:
        if self.config.trainer.resume_mode == "none":
            return 0
        step = self.checkpoints.restore_latest(self.learner, warn=self.display.warn)
        self.world.require_same("step to go on from", str(step))
        self.display.print(f"resuming after step {step}" if step else "no checkpoint yet: starting from the first step")
        if step:
            state = self.world.from_main("questions used so far", lambda: self.checkpoints.data(step))
            known = {"next": step * self.config.trainer.train_batch_size, "owed": []}  # all that older checkpoints need
            self.supply.restore(state["supply"] if state else known, {task.id: task for task in self.data.train})
            go_on(self.order, state.get("order") if state else None)
        return step

    def _data_state(self) -> dict[str, Any]:
        """Which questions come next, for the checkpoint."""
        return {"supply": self.supply.state, "order": self.order.state}

    def _supply(self) -> Supply:
        """The questions of all epochs, or of as many steps as there will be."""
        trainer = self.config.trainer
        steps = self.total * trainer.train_batch_size
        return Supply(
            self.order, len(self.order) * trainer.epochs if trainer.algorithm.dynamic_sampling.type else steps
        )

    def _total_steps(self) -> int:
        trainer = self.config.trainer
        per_epoch = steps_per_epoch(len(self.data.train), trainer.train_batch_size)
        if per_epoch == 0:
            raise UserError(
                f"trainer.train_batch_size = {trainer.train_batch_size}, but there are only {len(self.data.train)} "
                f"training questions; lower it or add questions"
            )
        total = per_epoch * trainer.epochs
        return min(total, trainer.max_steps) if trainer.max_steps else total

    def _due(self, interval: int) -> bool:
        if self.step == 0:
            return interval == self.config.trainer.eval_interval and self.config.trainer.eval_before_train
        return self.step == self.total or (interval > 0 and self.step % interval == 0)

    def _evaluate_all(self) -> None:
        """Evaluates unless a resumed run has that already; first and last also with one turn, to show what looking adds."""
        limits = [self.config.generator.max_turns] + [1] * (self.step in (0, self.total))
        done = self.world.from_main(
            "evaluations", lambda: [m["max_turns"] for m in self.run.history("eval") if m["step"] == self.step]
        )
        for limit in dict.fromkeys(limits):
            if limit not in done:
                self.evaluate(limit)

    def _plan(self) -> None:
        rows = plan_rows(
            self.config,
            parameters=self.learner.parameter_count,
            trained=self.learner.trained_count,
            devices=f"{jax.device_count()} {jax.default_backend()} ({jax.process_count()} processes)",
            mesh=dict(self.learner.mesh.shape),
            questions=(len(self.data.train), len(self.data.val)),
            steps=(self.step, self.total),
            run_dir=str(self.run.dir),
        )
        self.display.plan(rows)
        if self.config.trainer.max_staleness and not correction(self.config):
            self.display.warn(
                "the masks of trainer.algorithm.off_policy_correction drop tokens and episodes, but nothing weighs those "
                "that stay and are behind (trainer.max_staleness): set its tis_ratio_type to token"
            )

    def _tell(self, metrics: dict[str, float], batch: Batch) -> None:
        """Says what the step's metrics call for, and now and then shows one of its episodes."""
        self.signals.append(kept(metrics))
        for text in new_signals(self.signals):
            self.display.warn(f"step {self.step}: {text}")
        trainer = self.config.trainer
        if trainer.print_samples_interval and self.step % trainer.print_samples_interval == 0:
            episode = pick(batch.episodes, trainer.seed, self.step)
            self.display.print(episode_text(episode, self.data.by_id[episode.task_id], self.step))


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self._last = self._start = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[f"timing/{name}"] = now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        return self._laps | {"timing/step": time.monotonic() - self._start}
