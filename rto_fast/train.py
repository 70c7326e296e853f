"""`python -m rto_fast.train`: SFT → reward model → DPO → RTO, each stage trained or supplied."""

import json
import os
import signal
import sys
import time

from rto_fast.config import load_config
from rto_fast.errors import Interrupted, UserError


def main(arguments=None):
    """Runs the configured stages; returns {policy name: Evaluation}."""
    config = load_config(sys.argv[1:] if arguments is None else list(arguments))
    start = time.perf_counter()
    from rto_fast.evaluation import table  # after the configuration: --help and its mistakes need no torch
    from rto_fast.run import Run

    run = Run(config)
    sft = run.train_sft()
    reward_model = run.train_reward_model(sft)
    dpo = run.train_dpo(sft)
    scorer = run.scorer(reward_model)
    judge, judge_name = run.judge(scorer)
    policies, last = {"SFT": sft, "DPO": dpo}, "DPO"
    if config.rto.enabled:
        last = "RTO" if config.pays_dense_reward else "PPO"
        policies[last] = run.train_rto(last, sft, dpo, reward_model, scorer, judge)
    results = {}
    if judge:
        results = {name: run.evaluate_directory(name, path, judge) for name, path in policies.items() if path}
        summary = {name: vars(result) for name, result in results.items()}
        (run.folder / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
        run.log.say("\n" + table(results, judge_name))
    run.log.close()
    if report := run.report():
        run.log.say(f"\nreport: {report}")
    seconds = time.perf_counter() - start
    run.log.say(f"\n{seconds:.0f} s; the aligned model is an ordinary Hugging Face checkpoint in {policies[last]}")
    return results


def command():
    """The command line: mistakes of the user end in one line and exit code 2, unless --debug asks for the traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        main(arguments)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"rto_fast: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"rto_fast: {stop}", file=sys.stderr)
        sys.exit(130 if stop.signal == signal.SIGINT else 0)  # a scheduler that asks for an end gets one
    except KeyboardInterrupt:
        print("rto_fast: interrupted; --resume goes on from the last checkpoint, if there is one", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    command()
