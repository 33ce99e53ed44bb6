"""What a command says instead of a traceback."""


class CannotRun(Exception):
    """The call asks for what this machine or this input cannot give. The message says what would do."""


class MeasurementFailed(Exception):
    """A measured process died. The message names the run."""
