"""`python -m rto_fast.train`: SFT → reward model → DPO → RTO, each stage trained or supplied."""

import json
import sys
import time
import warnings
from typing import TYPE_CHECKING

from rto_fast.config import load_config
from rto_fast.system.command_line import run_command
from rto_fast.system.terminal import say, speaks
from rto_fast.training.stop import StopRequest

if TYPE_CHECKING:
    from rto_fast.run import Run


def main(arguments: list[str] | None = None) -> dict:
    """Runs the configured stages; returns {policy name: Evaluation}."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with StopRequest() as stop:
        # deepspeed's launcher adds it, which says the same in the environment
        arguments = [a for a in arguments if not a.startswith("--local_rank=")]
        config = load_config(arguments, _say)
        stop.folder = config.resume
        from rto_fast.training.launch import joined  # after the configuration: --help and its mistakes need no torch

        with joined(use_deepspeed=bool(config.deepspeed.zero_stage)):
            return train(config, stop)


def _say(text: str) -> None:
    """What is said before the run has its log; of several processes, one speaks."""
    if speaks():
        say(text)


def train(config, stop):
    """Runs the stages of `config` as one of its ranks, until `stop` asks for an end; no other run can do so meanwhile."""
    from rto_fast.run import Run
    from rto_fast.system.progress import progress
    from rto_fast.training.output_folder import claimed_output

    start = time.perf_counter()
    # The run's log takes all warnings until the end.
    with warnings.catch_warnings(), claimed_output(config) as lock:
        with progress("reading models' settings and data"):
            run = Run(config, stop, lock)
        return run_stages(run, start)


def run_stages(run: "Run", start: float) -> dict:
    """SFT → reward model → DPO → RTO, the evaluations, the report and the model card.

    Args:
        start: when the command began, by `time.perf_counter`.
    """
    config = run.config
    from rto_fast.evaluation import table
    from rto_fast.training.ranks import is_main
    from rto_fast.training.state_files import write_text

    with run.checkpoints.resumable():
        sft = run.train_sft()
        reward_model = run.train_reward_model(sft)
        dpo = run.train_dpo(sft)
        scorer = run.scorer(sft, reward_model)
        judge, judge_name = run.judge(scorer)
        policies, last = {"SFT": sft, "DPO": dpo}, "DPO"
        if config.rto.enabled:
            last = "RTO" if config.pays_dense_reward else "PPO"
            policies[last] = run.train_rto(last, sft, dpo, reward_model, scorer, judge)
        results = {}
        if judge:
            results = {name: run.evaluate_directory(name, path, judge) for name, path in policies.items() if path}
            summary = {name: vars(result) for name, result in results.items()}
            if is_main():
                write_text(run.folder / "results.json", json.dumps(summary, indent=2) + "\n")
            run.log.say("\n" + table(results, judge_name))
        run.log.close()
    if report := run.report():
        run.log.say(f"\nreport: {report}")
    run.publish()
    seconds = time.perf_counter() - start
    run.log.say(f"\n{seconds:.0f} s; the aligned model is an ordinary Hugging Face checkpoint in {policies[last]}")
    return results


def command() -> None:
    run_command(main, interrupted="interrupted; --resume goes on from the last checkpoint, if there is one")


if __name__ == "__main__":
    command()
