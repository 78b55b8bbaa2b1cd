"""What Redline raises and what it warns of."""


class ConfigurationError(ValueError):
    """Redline was set up in a way that cannot work: says what was got, what was expected and what to do."""


class StepRejectedError(RuntimeError):
    """A controller rejected a step whose optimizer state could not be taken back, so the run was stopped."""


class ControllerError(RuntimeError):
    """A controller raised: the parameters are as the optimizer left them."""


class RedlineWarning(UserWarning):
    """Something could not be measured, shown or served; the run goes on."""
