"""What Redline raises and what it warns of."""


class ConfigurationError(ValueError):
    """Redline was set up in a way that cannot work: says what was got, what was expected and what to do."""


class RunStoppedError(RuntimeError):
    """A controller stopped the run: to go on would have been worse. The parameters are as they were before the step."""


class ControllerError(RuntimeError):
    """A controller raised: the parameters are as the optimizer left them."""


class RedlineWarning(UserWarning):
    """Something could not be measured, shown or served; the run goes on."""
