"""Processes of their own, and `svp` in one; forked from one that has loaded torch already."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

CONTEXT = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    CONTEXT.set_forkserver_preload(["process", "training.victim", "svp.training.loop", "torch._dynamo"])


class Forked:
    """A process that runs target(said, *args), said being the two files for what it prints and prints as errors."""

    def __init__(self, target, *args):
        self.paths = [Path(tempfile.mkstemp(prefix=f"svp-{name}-")[1]) for name in ("output", "errors")]
        self.process = CONTEXT.Process(target=target, args=([str(path) for path in self.paths], *args))
        self.process.start()

    @property
    def returncode(self):
        """None while it runs; -9 after SIGKILL."""
        return self.process.exitcode

    def send(self, kind):
        os.kill(self.process.pid, kind)

    def end(self, timeout=120):
        """(what it printed, what it printed as errors), once it has ended."""
        self.process.join(timeout)
        if self.returncode is None:
            self.process.kill()
        said = [path.read_text(encoding="utf-8") for path in self.paths]
        for path in self.paths:
            path.unlink()
        assert self.returncode is not None, f"still running after {timeout} s: {said}"
        return said


class Command(Forked):
    """A command line at work.

    environment  variables to set;  encoding: of what is printed
    memory       bytes that may be taken beside those of the loaded program
    """

    def __init__(self, *words, environment=None, encoding="utf-8", memory=None):
        super().__init__(live, words, os.getcwd(), environment or {}, encoding, memory)


def redirect(said):
    """What this process prints goes to the two files."""
    for stream, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY), stream)


def live(said, words, folder, environment, encoding, memory):
    """The life of a command: streams, folder and environment as a shell would give them, then `svp`."""
    import torch

    from svp.cli.main import main

    redirect(said)
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ |= environment
    torch.set_num_threads(1)
    if memory is not None:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.argv = ["svp", *words]
    main()
