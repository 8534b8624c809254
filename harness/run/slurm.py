"""Run the jobs of a sweep on a Slurm cluster, through submitit: `launcher=slurm`.

Model jobs become one job array; every timing job is submitted alone and has its node to itself. submitit asks
`sacct`, which a cluster without accounting does not have. So a job has ended here when its result is written,
and is dead when `squeue` lists it no longer and there is no result. A dead job is submitted again and goes on
from its records and its checkpoint, like one that Slurm requeues.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.record.schema import Point
from harness.run.job import JobSpec
from harness.run.launcher import Launcher
from harness.run.progress import tell
from harness.run.supervision import InputError, run_job

#: How many times in a row `squeue` must miss a job before it is dead: on a shared file system, a result may
#: show some time after it was written.
NUM_MISSES = 3
#: Seconds before the time limit at which Slurm warns a job, so that it can be requeued.
WARNING_S = 60


@dataclass(frozen=True, kw_only=True)
class NodeJob:
    """The call that a node makes: supervise the worker of one job.

    give_up: status and reason of what is not measured yet; None: measure it.
    """

    job: JobSpec
    give_up: dict[str, str] | None = None

    def __call__(self) -> tuple[list[Point], str | None]:
        """Return the job's typed failures, and why it refuses its input, if it does."""
        stopping = threading.Event()  # Slurm's SIGTERM ends the worker too, which is no failure of its cell
        signal.signal(signal.SIGTERM, lambda *_: stopping.set())
        if "SLURM_CPUS_PER_TASK" in os.environ:
            os.environ.setdefault("OMP_NUM_THREADS", os.environ["SLURM_CPUS_PER_TASK"])
        try:
            failures = run_job(self.job, line=0, stopping=stopping, give_up=self.give_up)
        except InputError as error:
            return [], str(error) or "it refuses its input"
        return failures, None

    def checkpoint(self) -> Any:
        """Tell submitit what to run after a requeue: the same call, which goes on from the records."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(kw_only=True)
class _Submission:
    call: NodeJob
    handle: Any
    num_tries: int
    num_misses: int = 0


class SlurmLauncher(Launcher):
    """Submits jobs and waits for their results.

    partition, account: as sbatch takes them; None: the cluster's default.
    time_minutes:       time limit of a job. One that reaches it is requeued and goes on.
    num_requeues:       how often a job may reach it.
    num_cpus, num_gpus, memory_gb: of one job; memory_gb None: the cluster's default.
    num_jobs_at_once:   elements of the array that run at once.
    num_tries:          how often a job is submitted that ends without a result, before its cells are recorded
                        as crashed.
    poll_s:             seconds between two looks at the results and at `squeue`.
    sbatch:             further options of sbatch, by name without the dashes.

    Raises ValueError where submitit or Slurm's commands are missing, and where no time would be left to work.
    """

    is_local = False

    def __init__(
        self,
        *,
        partition: str | None,
        account: str | None,
        time_minutes: int,
        num_cpus: int,
        num_gpus: int,
        memory_gb: float | None,
        num_jobs_at_once: int,
        num_tries: int,
        num_requeues: int,
        poll_s: float,
        sbatch: dict[str, Any],
    ) -> None:
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise ValueError(
                "launcher=slurm needs the package submitit; install it with pip install -e '.[slurm]'."
            ) from None
        missing = [name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None]
        if missing:
            raise ValueError(
                f"launcher=slurm needs Slurm's {', '.join(missing)} on this machine; start it on a login "
                "node of a cluster, or use launcher=local."
            )
        if time_minutes * 60 <= WARNING_S:
            raise ValueError(
                f"launcher.time_minutes={time_minutes} must be larger: a job is requeued "
                f"{WARNING_S} s earlier than that."
            )
        self.num_tries, self.num_requeues, self.poll_s = num_tries, num_requeues, poll_s
        options = {
            "partition": partition,
            "account": account,
            "time": time_minutes,
            "cpus_per_task": num_cpus,
            "gpus_per_node": num_gpus or None,
            "mem": None if memory_gb is None else f"{int(memory_gb * 1024)}MB",
            "array_parallelism": num_jobs_at_once,
            "ntasks_per_node": 1,
            # With an exclusive node, srun would start a task per CPU; and it takes no CPUs from sbatch.
            "srun_args": ["--ntasks=1", f"--cpus-per-task={num_cpus}"],
            "additional_parameters": {"requeue": True, **sbatch},
            "signal_delay_s": WARNING_S,
            "job_name": "longarch",
        }
        self._options = {name: value for name, value in options.items() if value is not None}

    def run(self, jobs: Sequence[JobSpec], on_end: Callable[[list[Point], int], None]) -> None:
        """Run all jobs; see `Launcher.run`. All that are under way are cancelled when this raises."""
        _check_is_alone({job.output for job in jobs})
        under_way: list[_Submission] = []
        try:
            under_way += self._submit([NodeJob(job=job) for job in jobs if not job.is_timing])
            for job in jobs:
                if job.is_timing:
                    under_way += self._submit([NodeJob(job=job)])
            while under_way:
                time.sleep(self.poll_s)
                listed = _listed_ids()
                for submission in list(under_way):
                    if _has_result(submission) or _is_dead(submission, listed):
                        under_way.remove(submission)
                        failures, again = self._end(submission)
                        under_way += again
                        if not again:
                            on_end(failures, len(under_way))
        finally:
            if under_way:
                subprocess.run(["scancel", *(s.handle.job_id for s in under_way)], check=False)

    def _submit(self, calls: Sequence[NodeJob], num_tries: int = 1) -> list[_Submission]:
        """Submit calls of one kind: model jobs, or one timing job."""
        if not calls:
            return []
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError

        executor = SlurmExecutor(_folder(calls[0].job.output), max_num_timeout=self.num_requeues)
        own = {"exclusive": True} if calls[0].job.is_timing else {}
        executor.update_parameters(**self._options, **own)
        try:
            with executor.batch():
                handles = [executor.submit(call) for call in calls]
        except FailedJobError as error:
            raise ValueError(f"sbatch refuses the job: {' '.join(str(error).split())}") from error
        tell(f"Slurm job {handles[0].job_id.split('_')[0]}: {', '.join(call.job.name for call in calls)}")
        return [
            _Submission(call=c, handle=h, num_tries=num_tries) for c, h in zip(calls, handles, strict=True)
        ]

    def _end(self, submission: _Submission) -> tuple[list[Point], list[_Submission]]:
        """Return the failures of a job that has ended, or its next try where it has no result."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        call, handle, num_tries = submission.call, submission.handle, submission.num_tries
        try:
            if _has_result(submission):
                failures, refusal = handle.result()
                if refusal is not None:
                    raise InputError(f"{call.job.name}: {refusal}; its output is in {handle.paths.stderr}")
                return failures, []
        except (FailedJobError, UncompletedJobError):
            pass
        reason = f"Slurm's job {handle.job_id} ended without a result; its output is in {handle.paths.stderr}"
        if call.give_up is not None:  # not even that
            config = call.job.configs[0]
            point = Point(
                run_id="",
                arch=config.arch.name,
                size=config.size.name,
                seed=config.seed,
                task="train",
                cell={},
                status="crashed",
                reason=reason,
            )
            return [point], []
        if num_tries < self.num_tries:
            tell(f"{call.job.name}: {reason}; it is submitted again.")
        else:
            tell(f"{call.job.name}: {reason}, at the last of {num_tries} tries; its cells are given up.")
            call = replace(call, give_up={"status": "crashed", "reason": reason})
        return [], self._submit([call], num_tries + 1)


def _folder(output: Path) -> Path:
    return output / "slurm"


def _has_result(submission: _Submission) -> bool:
    return bool(submission.handle.paths.result_pickle.exists())


def _is_dead(submission: _Submission, listed: set[str] | None) -> bool:
    """Return whether `squeue` has missed the job often enough; one that does not answer says nothing."""
    if listed is not None:
        is_listed = submission.handle.job_id in listed
        submission.num_misses = 0 if is_listed else submission.num_misses + 1
    return submission.num_misses >= NUM_MISSES


def _listed_ids() -> set[str] | None:
    """Return the ids of this user's jobs that wait or run, elements of arrays as "12_3"; None: no answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(answer.stdout.split()) if answer.returncode == 0 else None


def _check_is_alone(outputs: set[Path]) -> None:
    """Raise ValueError where jobs that an earlier command submitted for these results still wait or run."""
    submitted = {
        path.name.removesuffix("_submitted.pkl")
        for output in outputs
        for path in _folder(output).glob("*_submitted.pkl")
    }
    left = sorted(submitted & (_listed_ids() or set()))
    if left:
        raise ValueError(
            "Jobs of an earlier command for the same results are still in the queue; wait for them, or end "
            f"them with scancel {' '.join(left)}."
        )
