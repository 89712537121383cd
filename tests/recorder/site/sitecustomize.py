"""Python imports this at its start in a recorder's environment: cuda-python calls the recorder instead of a driver.

cuda-python carries its own copy of CUDA's runtime library. Its functions reach the modules above it as capsules, which
are exchanged here before anybody takes them; what checks and converts arguments stays as it is.
"""

import ctypes
import os


def exchange(runtime: ctypes.CDLL) -> None:
    """Put the recorder's functions in the place of cuda-python's own."""
    import cuda.bindings._internal.runtime as own

    make, name = ctypes.pythonapi.PyCapsule_New, ctypes.pythonapi.PyCapsule_GetName
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    for function, capsule in list(own.__pyx_capi__.items()):
        ours = getattr(runtime, function.lstrip("_"), None)
        if ours is not None:
            signature = name(capsule)
            signatures.append(signature)
            own.__pyx_capi__[function] = make(ctypes.cast(ours, ctypes.c_void_p).value, signature, None)


signatures = []  # a capsule keeps the address of its name alone
exchange(ctypes.CDLL(os.environ["RECORDER_RUNTIME"], mode=ctypes.RTLD_GLOBAL))
