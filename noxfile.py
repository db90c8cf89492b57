"""Run the tests by hand on three Pythons: with the oldest packages in range, a hosted notebook's, and the newest.

pip install "nox[uv]"
nox                                    # all three: 6 GB of downloads and 10 minutes on 2 cores each
nox -s "tests(oldest)" -- tests/unit   # one of them; arguments go to pytest
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
FILES = ("-r", "requirements.txt", "-r", "tests/requirements.txt")
COLAB = (
    "torch==2.11.0",
    "torchvision==0.26.0",
    "numpy==2.0.2",
    "pandas==2.2.2",
    "scipy==1.16.3",
    "scikit-learn==1.6.1",
    "matplotlib==3.10.0",
    "pillow==11.3.0",
    "filelock==3.29.0",
    "joblib==1.5.3",
    "opencv-python-headless==4.13.0.92",
)


@nox.session
@nox.parametrize(
    ("python", "packages"),
    [("3.11", "oldest"), ("3.12", "colab"), ("3.13", "newest")],
    ids=["oldest", "colab", "newest"],
)
def tests(session: nox.Session, packages: str) -> None:
    """Run unit and stage tests on one Python with one set of packages."""
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(COLAB) if packages == "colab" else "")
    # The oldest of what the project itself requires; the tests' packages and all others are the newest that fit.
    if packages == "oldest":
        session.run(
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--no-annotate",
            "--resolution",
            "lowest-direct",
            "--python-version",
            str(session.python),
            "requirements.txt",
            "--output-file",
            str(constraints),
        )
    session.install(*FILES, "--constraint", str(constraints))
    session.run(
        "python",
        "-m",
        "pytest",
        "--numprocesses",
        "auto",
        "--dist",
        "loadfile",
        *(session.posargs or ("tests/unit", "tests/stage")),
        env={"OMP_NUM_THREADS": "1"},
    )
