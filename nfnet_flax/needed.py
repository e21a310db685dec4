"""What to do if a package that this one needs is not installed, as after `pip install --no-deps`."""

NAMES = {
    "PIL": "pillow",
    "absl": "absl-py",
    "array_record": "array-record",
    "clu": "clu",
    "cv2": "opencv-python-headless",
    "flax": "flax",
    "grain": "grain",
    "importlib_resources": "importlib-resources",
    "jax": "jax",
    "numpy": "numpy",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "rich": "rich",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "simplejpeg": "simplejpeg",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "tensorflow": "tensorflow",
    "tensorflow_datasets": "tensorflow-datasets",
    "tensorstore": "tensorstore",
    "tyro": "tyro",
}
"""What is imported -> the package that is installed for it. Extras are not here: what needs one names it."""


def what_to_install(error: BaseException) -> str | None:
    """Says which package an import did not find, and how to install it; None if the error is another one."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None or error.name.split(".")[0] not in NAMES:
        return None
    package = NAMES[error.name.split(".")[0]]
    return (
        f"the package {package} is not installed, or not complete (there is no module {error.name!r}); "
        "pip install nfnet_flax adds everything that nfnet_flax needs and that is missing"
    )
