"""`python -m testkit.recording [SITUATION ...]`: record situations anew, all of them by default; some eight minutes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from testkit.recording.everything import EVERY, needs_queues, record
from testkit.recording.plant import plant


def main(wanted: Sequence[str]) -> int:
    """Record; return 1 where a situation did not come about, which says why and keeps no other from being recorded."""
    unknown = sorted(set(wanted) - set(EVERY))
    if unknown:
        raise SystemExit(f"no such situations: {', '.join(unknown)}; there are {', '.join(EVERY)}")
    chosen = [EVERY[name] for name in (wanted or EVERY)]
    failed = 0
    with plant(queues=any(needs_queues(found) for found in chosen)) as kube:
        for situation in chosen:
            try:
                print(record(kube, situation).name, flush=True)
            except (TimeoutError, RuntimeError) as error:
                failed += 1
                print(f"{situation.name} did not come about: {error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
