"""`python -m rto_fast.evaluate`: how good a policy is, by every measure that the options allow, with 95 % intervals.

    python -m rto_fast.evaluate --model runs/default/rto --reference runs/default/sft --data embedded:eval_prompts \\
        --reward rto_fast.data.world:gold_reward --rollout.max_new_tokens 60 --output evaluation.json

| given                        | measured                                                                        |
|------------------------------|---------------------------------------------------------------------------------|
| model, data                  | length of the responses, share that ended                                       |
| reward and/or reward_model   | mean score of the responses                                                     |
| … and reference              | win rate over the reference's responses to the same prompts, ties half;         |
|                              | the same with length controlled for                                             |
| reference                    | KL(model ‖ reference)                                                           |
| preferences, and a reward    | share of the pairs that the reward ranks right, ties half                       |
| preferences, and dpo_model   | the same of the implicit reward Σ log(π_dpo/π_ref) over a response              |

`rto_fast.estimates` and `rto_fast.evaluation` say what each is exactly.
"""

import functools

from rto_fast.config.help import Command
from rto_fast.config.options import parse
from rto_fast.evaluation.options import EvaluateConfig
from rto_fast.evaluation.output import check_output, table, write_json
from rto_fast.system.command_line import as_command
from rto_fast.system.terminal import say
from rto_fast.system.writing import own_descriptor

EVALUATE = Command(
    "rto_fast.evaluate",
    "Measures how good a policy is on held-out prompts: scores, win rates, preference accuracies and KL, each with its 95 % "
    "confidence interval.",
    {
        "--model runs/own/rto --reference runs/own/sft --data prompts.jsonl --reward_model runs/own/reward_model": "mean "
        "score, win rate over the SFT model and KL to it",
        "--model DIR --data questions.jsonl --reward rto_fast.rewards:gsm8k": "exact answers, judged by a function",
        "--preferences pairs.jsonl --model DIR --reward_model DIR": "the share of pairs that a reward model ranks right",
    },
)


def main(arguments: list[str] | None = None) -> dict:
    """Measures what the options ask for; prints the table, writes the JSON, returns the results."""
    options = parse(EvaluateConfig, arguments, EVALUATE)
    if options.output and options.output != "-":
        check_output(options.output)
    # After the options: --help and mistakes in them need no torch.
    from rto_fast.evaluation.measure import measure, open_evaluation
    from rto_fast.preflight.checks import check_before_evaluation

    output = "/dev/stdout" if options.output == "-" else options.output
    # Where the JSON goes to stdout, everything else goes to stderr.
    tell = functools.partial(say, err=output is not None and own_descriptor(output) == 1)
    inputs = open_evaluation(options, tell)
    check_before_evaluation(inputs)
    results = measure(inputs)
    tell("\n" + table(results))
    if output:
        write_json(results, output)
        tell(f"\nwritten to {options.output}")
    return results


def command() -> None:
    with as_command(interrupted="interrupted, nothing is written"):
        main()


if __name__ == "__main__":
    command()
