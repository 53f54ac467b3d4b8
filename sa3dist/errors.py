"""What can go wrong, and the exit code each kind of failure ends the program with."""

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_ENVIRONMENT = 70
EXIT_INTERRUPTED = 75


class SA3DistError(Exception):
    """Base of every failure we explain ourselves: one message, no traceback, a fixed exit code.

    origin   (dist_rank, host) where it arose; None = here
    """

    exit_code = EXIT_BUG
    origin: tuple[int, str] | None = None


class ConfigError(SA3DistError):
    """A setting is unknown, out of range or contradicts another."""

    exit_code = EXIT_USER


class InUse(ConfigError):
    """Another run writes to the output directory; nothing in it is touched."""


class DataError(SA3DistError):
    """A clip, caption or archive cannot be used. The message may hold several lines, one per problem."""

    exit_code = EXIT_USER


class CheckpointError(SA3DistError):
    """A model directory, adapter file or training checkpoint does not fit."""

    exit_code = EXIT_USER


class EnvironmentFailure(SA3DistError):
    """The machine, the cluster or the numbers failed; the state is as last saved."""

    exit_code = EXIT_ENVIRONMENT


class LostPeer(EnvironmentFailure):
    """Another rank is gone or silent; the reason, if any, is for that rank to tell."""


class OutOfMemory(EnvironmentFailure):
    """A step did not fit into memory; less may."""


class Interrupted(SA3DistError):
    """A signal or a time limit stopped the run after its state was saved."""

    exit_code = EXIT_INTERRUPTED
