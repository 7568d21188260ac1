r"""Sample, judge, pair, train, evaluate, and again with the policy that came out.

    python -m internvl_mpo.rounds --config configs/rounds_mini.yaml
    python -m internvl_mpo.rounds --config configs/rounds_mini.yaml --arms mpo,sft --num_rounds 5

Every stage is a command, printed before it runs; those of this module are `select`, `judge` and `mix`. Finished
stages are skipped when the same command is given again, so a killed run goes on where it stopped (docs/rounds.md).
"""

import sys

from internvl_mpo.errors import run_program
from internvl_mpo.rounds.fixed_pairs import MixSettings, mix
from internvl_mpo.rounds.loop import Loop, table, write_results
from internvl_mpo.rounds.pass_rates import JudgeSettings, judge
from internvl_mpo.rounds.selection import SelectSettings, select
from internvl_mpo.rounds.settings import RoundsSettings
from internvl_mpo.settings import parse_settings, show_settings, write_settings

PROGRAM = "-m internvl_mpo.rounds"
COMMANDS = {"select": (SelectSettings, select), "judge": (JudgeSettings, judge), "mix": (MixSettings, mix)}


def main(argv: list[str]) -> int:
    """Run one of `COMMANDS`, or all rounds; 1 if an arm ended early."""
    if argv and argv[0] in COMMANDS:
        settings_class, run = COMMANDS[argv[0]]
        about = sys.modules[run.__module__].__doc__ or ""
        run(parse_settings(settings_class, argv[1:], program=f"{PROGRAM} {argv[0]}", about=about))
        return 0
    settings = parse_settings(RoundsSettings, argv, program=PROGRAM, about=__doc__)
    settings.check_files()
    print(show_settings(settings, "Preference optimization in rounds"), flush=True)
    write_settings(settings, f"{settings.output}/settings.yaml")
    loop = Loop(settings)
    failed = loop.run()
    found = write_results(loop)
    print(f"\n{table(found)}\n")
    for name, arm in found["arms"].items():
        best = arm["best"]
        print(f"best of {name}: round {best}, {loop.lanes.policy(name, best)}")
    print(f"report {loop.out / 'report.html'}\nnumbers {loop.out / 'results.json'}")
    for name, error in failed.items():
        print(f"{name} ended after round {loop.rounds[name]}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_program(main))
