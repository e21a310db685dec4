"""The account of a run: on what its wall time was spent, across all its sessions, and what each interruption cost.

Every second from the beginning of the first session to the last line of `events.jsonl` belongs to one part, so the
parts add up to the wall time. Only the time after a run was finished does not count, until it is made longer. Goodput
is the share of the wall time in which updates were computed that the run still has.
"""

import dataclasses
import itertools
import math
import typing
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from nfnet_flax.telemetry.ledger import Category
from nfnet_flax.telemetry.sessions import Ending, History, Line, Session

Part = Literal[
    "productive",
    "repeated",
    "start",
    "restore",
    "compile",
    "input",
    "save",
    "evaluation",
    "end",
    "unrecorded",
    "not_running",
]
PARTS: tuple[Part, ...] = typing.get_args(Part)
"""`productive`: computing steps that count. `repeated`: computing steps that were lost, because a later session
continued from an earlier step. `unrecorded`: time within a session whose lines cannot be read. `not_running`: time
between two sessions; after a kill, this includes the time since the last line. The others are categories of
the ledger."""
Cause = Literal["stopped", "failed", "killed"]
"""How a session ended before the run was finished."""
CAUSES: tuple[Cause, ...] = typing.get_args(Cause)

_ROUNDING_S = 0.01
"""By how much the seconds of one line may differ from the time since the line before it, as all are rounded."""
_OWN_PART: dict[Category, Part] = {
    "start": "start",
    "restore": "restore",
    "compile": "compile",
    "input": "input",
    "save": "save",
    "evaluation": "evaluation",
    "end": "end",
}
"""Category -> part, for categories other than `step`, whose seconds are divided."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionAccount:
    """On what a session spent its time, and what its end cost."""

    session: Session
    seconds: dict[Part, float]
    """Part -> seconds; all parts but `not_running`."""
    num_productive: int
    """Number of its steps that count."""
    num_repeated: int
    """Number of its steps that were lost."""
    gap_s: float | None
    """Seconds from its last line to the beginning of the next session; None: there is no next one."""
    interruption: "Interruption | None"
    """What its end cost; None: the run was finished, or has not been continued."""

    @property
    def ending(self) -> Ending | Literal["killed"] | None:
        """How it ended; None: it is the last one and has recorded no end, so it is running, or was killed."""
        return "killed" if self.session.ending is None and self.gap_s is not None else self.session.ending


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interruption:
    """What it cost that a session ended before the run was finished."""

    not_running_s: float
    """Seconds until the next session began."""
    start_s: float
    """Seconds that the next session needed to start."""
    restore_s: float
    """Seconds that the next session needed to restore a checkpoint."""
    compile_s: float
    """Seconds that the next session spent on compiling."""
    repeated_s: float
    """Seconds in which the steps were computed that were lost because of this end."""
    num_repeated: int
    """Number of these steps."""

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.not_running_s + self.start_s + self.restore_s + self.compile_s + self.repeated_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """On what a run spent its wall time."""

    wall_s: float
    """From the beginning of the first session to the last line, without `finished_s`; the sum of `seconds`."""
    seconds: dict[Part, float]
    """Part -> seconds, in the order of `PARTS`."""
    not_running_s: dict[Cause, float]
    """Seconds between sessions, by how the session before ended."""
    finished_s: float
    """Seconds between sessions in which the run was finished; later it was made longer."""
    num_needless: int
    """Number of sessions that found the run finished and ended at once. They are not among `sessions`."""
    num_productive: int
    """Number of recorded steps that count."""
    num_repeated: int
    """Number of recorded steps that were lost."""
    set_back_s: float
    """Seconds by which clocks were set back, or differed between hosts. Where time seems to go back it is not counted,
    so the wall time is longer by this than the difference of the first and the last time."""
    sessions: tuple[SessionAccount, ...]

    @property
    def goodput(self) -> float:
        """Share of the wall time in which steps were computed that count, 0 to 1."""
        return self.seconds["productive"] / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def interruptions(self) -> list[Interruption]:
        """What each end of a session cost before which the run was not finished."""
        return [one.interruption for one in self.sessions if one.interruption is not None]


@dataclasses.dataclass
class _Spent:
    """Sums of one session while its lines are read."""

    seconds: dict[Part, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    set_back_s: float = 0.0
    num_productive: int = 0
    lost: dict[int, tuple[int, float]] = dataclasses.field(default_factory=dict)
    """Index of a later session -> number of steps that were lost as it continued before them, and their seconds."""


def account_of(history: History) -> Account:
    """The account of a run; one without sessions has no wall time."""
    sessions = _that_worked(history.sessions)
    spent = [_spent_in(session, _rewinds(sessions, index)) for index, session in enumerate(sessions)]
    gaps = [after.began_at_s - before.last_at_s for before, after in itertools.pairwise(sessions)]
    lost = _lost_by_end(sessions, spent)
    accounts = []
    for index, (session, own) in enumerate(zip(sessions, spent, strict=True)):
        gap_s = max(0.0, gaps[index]) if index < len(gaps) else None
        interruption = None
        if gap_s is not None and session.ending != "finished":
            following = spent[index + 1].seconds
            num_repeated, repeated_s = lost[index]
            interruption = Interruption(
                not_running_s=gap_s,
                start_s=following["start"],
                restore_s=following["restore"],
                compile_s=following["compile"],
                repeated_s=repeated_s,
                num_repeated=num_repeated,
            )
        accounts.append(
            SessionAccount(
                session=session,
                seconds={part: own.seconds[part] for part in PARTS if part != "not_running"},
                num_productive=own.num_productive,
                num_repeated=sum(count for count, _ in own.lost.values()),
                gap_s=gap_s,
                interruption=interruption,
            )
        )
    set_back_s = sum(own.set_back_s for own in spent) + sum(-gap for gap in gaps if gap < 0)
    return _total(accounts, set_back_s, len(history.sessions) - len(sessions))


def _that_worked(sessions: Sequence[Session]) -> list[Session]:
    """The sessions without those that found the run finished, and so only looked at it."""
    found: list[Session] = []
    for session in sessions:
        is_finished = bool(found) and found[-1].ending == session.ending == "finished"
        if not (is_finished and session.from_step == session.last_step == found[-1].last_step):
            found.append(session)
    return found


def _total(accounts: Sequence[SessionAccount], set_back_s: float, num_needless: int) -> Account:
    not_running_s: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)
    finished_s = 0.0
    for one in accounts:
        if one.gap_s is None:
            continue
        if one.ending == "finished":
            finished_s += one.gap_s
        elif one.ending is not None:
            not_running_s[one.ending] += one.gap_s
    seconds = {part: sum(one.seconds.get(part, 0.0) for one in accounts) for part in PARTS}
    seconds["not_running"] = sum(not_running_s.values())
    wall_s = sum(seconds.values())
    if accounts:
        first, last = accounts[0].session, accounts[-1].session
        by_clock_s = last.last_at_s - first.began_at_s + set_back_s - finished_s
        num_lines = sum(len(one.session.lines) for one in accounts)
        assert math.isclose(wall_s, by_clock_s, rel_tol=1e-6, abs_tol=num_lines * _ROUNDING_S), (wall_s, by_clock_s)
    return Account(
        wall_s=wall_s,
        seconds=seconds,
        not_running_s=not_running_s,
        finished_s=finished_s,
        num_needless=num_needless,
        num_productive=sum(one.num_productive for one in accounts),
        num_repeated=sum(one.num_repeated for one in accounts),
        set_back_s=set_back_s,
        sessions=tuple(accounts),
    )


def _rewinds(sessions: Sequence[Session], index: int) -> list[tuple[int, int]]:
    """Which later sessions continued from an earlier step than all between this session and them: the index of each,
    and that step."""
    found: list[tuple[int, int]] = []
    own = sessions[index].from_step
    for later in range(index + 1, len(sessions)):
        step = sessions[later].from_step
        if step is not None and (not found or step < found[-1][1]):
            found.append((later, step))
            if own is not None and step <= own:  # nothing of this session is left
                break
    return found


def _spent_in(session: Session, rewinds: Sequence[tuple[int, int]]) -> _Spent:
    spent = _Spent()
    at_s, step = session.began_at_s, None
    for line in session.lines:
        known_s = sum(line.seconds.values())
        missing_s, at_s = line.at_s - at_s - known_s, line.at_s
        if missing_s > _ROUNDING_S:
            spent.seconds["unrecorded"] += missing_s
        elif missing_s < -_ROUNDING_S:
            spent.set_back_s -= missing_s
        for category, part in _OWN_PART.items():
            spent.seconds[part] += line.seconds.get(category, 0.0)
        # Before it has restored a checkpoint, a session does not know how many updates are done.
        before = line.step if step is None or line.event in ("start", "restored") else step
        _divide_steps(spent, before, line, rewinds)
        step = line.step if line.event != "start" else step
    return spent


def _divide_steps(spent: _Spent, before: int, line: Line, rewinds: Iterable[tuple[int, int]]) -> None:
    """Divides the steps after `before` that a line records, and their seconds, into those that count and those that
    were lost; each of them took the same part of the time."""
    num_steps, seconds = line.step - before, line.seconds.get("step", 0.0)
    num_left, left_s, end = num_steps, seconds, line.step
    for later, step in rewinds:
        num_lost = max(0, end - max(before, step))
        lost_s = seconds * num_lost / num_steps if num_steps > 0 else left_s if step < end else 0.0
        if num_lost > 0 or lost_s > 0:
            count, sum_s = spent.lost.get(later, (0, 0.0))
            spent.lost[later] = count + num_lost, sum_s + lost_s
        num_left, left_s, end = num_left - num_lost, left_s - lost_s, min(end, step)
        spent.seconds["repeated"] += lost_s
    spent.seconds["productive"] += max(0.0, left_s)
    spent.num_productive += num_left


def _lost_by_end(sessions: Sequence[Session], spent: Sequence[_Spent]) -> dict[int, tuple[int, float]]:
    """Index of a session -> number and seconds of the steps that were lost because of its end.

    If a session continues before a step that is done, the cause is the end of the last session before it that had
    restored a checkpoint, as those that ended earlier did no steps.
    """
    found: dict[int, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for own in spent:
        for later, (count, seconds) in own.lost.items():
            restored = (index for index in reversed(range(later)) if sessions[index].from_step is not None)
            cause = next(restored, later - 1)  # its line may be one that cannot be read
            found[cause] = found[cause][0] + count, found[cause][1] + seconds
    return found
