"""Whatever happens in whatever order, crashes between any two writes included: the promises hold and the job settles.

More than 5,000 steps here, 100,000 in `make nightly`. What may happen and what must hold: testkit/world.py.
"""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from testkit.world import World
from testkit.worlds import ChoicesWorld, DeletionWorld, LimitedWorld, PreflightWorld, QueuedWorld, TwoNodesWorld

STEPS = 25
"""Rules in one story."""
SHARES = {World: 70, TwoNodesWorld: 35, PreflightWorld: 40, LimitedWorld: 50, DeletionWorld: 25, ChoicesWorld: 25}
"""Shares of the steps, by world."""
AT_NIGHT = {**SHARES, QueuedWorld: 40}
DAILY_STEPS, NIGHTLY_STEPS = 5_000, 100_000


def tell(world: type[World], *, stories: int) -> int:
    """Let that many stories happen; return the number of steps."""
    before = World.steps
    run_state_machine_as_test(
        world,
        settings=settings(
            max_examples=stories,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
        ),
    )
    return World.steps - before


@pytest.mark.parametrize("world", SHARES)
def test_the_promises_hold(world: type[World]) -> None:
    share = -(-DAILY_STEPS * SHARES[world] // sum(SHARES.values()))
    done = 0
    while done < share:  # counted: a story may end before its last step
        done += tell(world, stories=max(10, (share - done) // STEPS))


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", AT_NIGHT)
def test_the_promises_hold_for_long(world: type[World]) -> None:
    share = NIGHTLY_STEPS * AT_NIGHT[world] // sum(AT_NIGHT.values())
    done = 0
    while done < share:
        done += tell(world, stories=100)
    print(f"{world.__name__}: {done} steps")
