"""The code of a job, as it was when the job was submitted: a queue may be long, and the clone goes on changing.

SOURCE/{vidit,parallel,...}   every file that git tracks or would track, with uncommitted changes
SOURCE/commit, source.diff    what it is called, and what differs from that

Without a repository (an installed wheel) there is nothing to copy, and the job runs what is installed.
"""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("vidit", "parallel", "launch", "configs", "cluster")


def take(target: Path, root: Path = ROOT) -> bool:
    """Copy the code to `target`, a new folder; False where `root` is no repository. RuntimeError where git fails."""
    if not (root / ".git").exists():
        return False
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
    for name in filter(None, listed.split("\0")):
        source, copy = root / name, target / name
        if source.is_file():  # a file that is deleted and not committed is listed too
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    (target / "commit").write_text(_git(root, "rev-parse", "HEAD").strip() + "\n")
    diff = _git(root, "diff", "HEAD")
    if diff:
        (target / "source.diff").write_text(diff, errors="surrogateescape")
    return True


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="surrogateescape", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"cannot copy the code of this job: {error}; it is taken with git from {root}") from error
    if done.returncode:
        raise RuntimeError(f"cannot copy the code of this job: `{' '.join(command)}` says {done.stderr.strip()}")
    return done.stdout
