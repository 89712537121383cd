"""One error per cause; each message names the thing, what was found, what was expected and what to do."""


class EngineError(Exception):
    """Anything a user, a file or a machine did that this package cannot work with."""


class BundleError(EngineError):
    """A bundle is missing, damaged, incomplete or of another format."""


class CacheError(EngineError):
    """A folder or file of the user's cache can be written by others, or cannot be used."""


class CheckpointError(EngineError):
    """An encoder checkpoint cannot be turned into weights."""


class HeadError(EngineError):
    """A regression head cannot be read or does not fit the encoder."""


class TokenizerError(EngineError):
    """A tokenizer cannot be read or used."""


class ParityError(EngineError):
    """A graph or a tokenizer disagrees with its oracle: no bundle is written, no session opened."""


class DeviceError(EngineError):
    """The requested device or execution provider is not active on this machine."""


class InputError(EngineError):
    """An input path, file, column or text cannot be read."""


class UnreadableError(InputError):
    """An input file is damaged or cannot be fetched; others may be sound."""


class UnsafeNameError(EngineError):
    """A relative name would lead out of its folder, or is none."""


class OutputError(EngineError):
    """The output cannot be written, or belongs to another job."""


class PartsError(OutputError):
    """Parts of one output file are gone; others may be complete."""
