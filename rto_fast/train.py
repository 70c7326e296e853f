"""`python -m rto_fast.train`: SFT → reward model → DPO → RTO → evaluation → report. Each stage is trained or supplied."""

import contextlib
import functools
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rto_fast.config import Config, load_config
from rto_fast.preflight.early import check_early, check_pairs_given, first_line
from rto_fast.system.command_line import as_command
from rto_fast.system.memory import kept_imports
from rto_fast.system.terminal import say, speaks
from rto_fast.training.stop import StopRequest

if TYPE_CHECKING:
    from rto_fast.evaluation.policies import Evaluation

INTERRUPTED = "interrupted; --resume goes on from the last checkpoint, if there is one"


def main(arguments: list[str] | None = None) -> dict[str, "Evaluation"]:
    """Runs the configured stages; returns what was measured of each policy, by its name."""
    with started(arguments) as (config, stop):
        return train(config, stop)


@contextlib.contextmanager
def started(arguments: list[str] | None = None) -> Iterator[tuple[Config, StopRequest]]:
    """Context in which signals are handled and the ranks are joined; yields the configuration and the stop request."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with StopRequest() as stop:
        # deepspeed's launcher adds --local_rank, which says the same as the environment
        arguments = [a for a in arguments if not a.startswith("--local_rank=")]
        config = load_config(arguments, say=lambda text: say(text) if speaks() else None)
        stop.folder = config.resume
        # What can be refused or said without torch comes before it is imported.
        check_early(config)
        if speaks():
            say(first_line(config))
        with kept_imports():
            from rto_fast.training.launch import joined

        with joined(use_deepspeed=bool(config.deepspeed.zero_stage)):
            yield config, stop


def train(config: Config, stop: StopRequest) -> dict[str, "Evaluation"]:
    """Runs the stages of a configuration in its output folder; in a launched run every rank calls this.

    Args:
        config: The configuration.
        stop: Asks the run to end.

    Returns:
        What was measured of each policy, by its name.

    Raises:
        UserError: The run cannot start, or cannot go on.
        Interrupted: `stop` asked for the end.
    """
    with kept_imports():
        from rto_fast.evaluation.policies import evaluate_iteration, evaluate_policies
        from rto_fast.preflight.checks import check_before_training
        from rto_fast.reporting.finish import publish_run, report_run
        from rto_fast.rewards.choice import choose_critic, choose_judge, choose_scorer, import_functions
        from rto_fast.rto.experience import load_models
        from rto_fast.rto.trainer import train_rto
        from rto_fast.session import claimed_output, open_training
        from rto_fast.stages import train_dpo, train_reward_model, train_sft
        from rto_fast.system.progress import progress
        from rto_fast.training.loader import Loader
        from rto_fast.training.ranks import is_main

    start = time.perf_counter()
    # Until the end, the run's log shows this package's warnings.
    with warnings.catch_warnings(), claimed_output(config) as lock:
        with progress("reading models' settings and data"):
            check_pairs_given(config)
            session = open_training(config, stop, lock)
            functions = import_functions(config, session.device)
            check_before_training(session, functions)
        with session.checkpoints.resumable():
            done, finish = session.done, session.finish
            sft = config.sft.model or done("sft") or finish("sft", train_sft(session, session.base))
            reward_model, dpo = config.reward_model.model, config.dpo.model
            if config.trains_reward_model:
                reward_model = done("reward_model") or finish("reward_model", train_reward_model(session, sft))
            if config.trains_dpo:
                dpo = done("dpo") or finish("dpo", train_dpo(session, sft))
            policies = {"SFT": sft}
            if dpo and config.needs_dpo_model:
                policies["DPO"] = dpo

            loader = Loader(config, session.placement)
            if config.rto.enabled:
                loader.share(sft)
            scorer = choose_scorer(session, loader, functions.reward, reward_model)
            judge, judge_name = choose_judge(session, functions.judge, scorer)
            if config.rto.enabled:
                rto = done("rto")
                if not rto:
                    critic = choose_critic(session, sft, reward_model, scorer)
                    evaluate = functools.partial(evaluate_iteration, session, judge) if judge else None
                    # The models have no name here: their memory is free before the policies are compared.
                    rto = finish(
                        "rto", train_rto(session, load_models(config, sft, dpo, critic, scorer, loader), evaluate)
                    )
                policies[config.final_policy] = rto
            results = evaluate_policies(session, policies, judge, judge_name)
            session.log.close()
        if is_main():
            report_run(session.folder, session.log)
            publish_run(config, session.folder, session.log)
        path, seconds = policies[config.final_policy], time.perf_counter() - start
        session.log.say(f"\n{seconds:.0f} s; the aligned model is an ordinary Hugging Face checkpoint in {path}")
        return results


def command() -> None:
    """The command `rto-fast`."""
    with as_command(interrupted=INTERRUPTED):
        main()


if __name__ == "__main__":
    with as_command(interrupted=INTERRUPTED), started() as (config, stop):
        train(config, stop)
