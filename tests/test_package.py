import ast
import subprocess
import sys
from pathlib import Path

import jaxdiff as jd

PACKAGE = Path(jd.__file__).parent
ALGORITHMS = ["level", "schedules", "times", "targets", "denoiser", "solvers", "sampling", "guidance", "losses", "codec"]
ALGORITHMS += ["codebook", "weights", "score", "likelihood", "objectives", "editing", "classifier", "checks"]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxdiff":
            yield from (f"jaxdiff.{a.name}" for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_algorithm_files_import_jax_numpy_and_each_other_only():
    allowed = {"jax", "numpy", "collections", "typing"}
    files = [
        path
        for name in ALGORITHMS
        for path in (PACKAGE.glob(f"{name}/*.py") if (PACKAGE / name).is_dir() else [PACKAGE / f"{name}.py"])
    ]
    assert len(files) > len(ALGORITHMS)
    for path in files:
        for module in imported(path):
            top, *rest = module.split(".")
            assert top in allowed or (top == "jaxdiff" and rest[0] in ALGORITHMS), f"{path.name} imports {module}"


def test_flax_stays_inside_models():
    for path in PACKAGE.rglob("*.py"):
        uses = any(module.split(".")[0] == "flax" for module in imported(path))
        assert not uses or path.parent.name == "models", path


def test_importing_jaxdiff_brings_none_of_the_heavy_packages():
    heavy = ("tensorflow", "tensorflow_datasets", "grain", "orbax", "torch")
    code = f"import sys, jaxdiff; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_fixed_names_are_there():
    names = """Level Prediction Solver logsnr diffuse posterior_std beta_std schedules.cosine schedules.straight schedules.edm
    schedules.linear_beta times.uniform times.karras times.strided targets.x0 targets.eps targets.v targets.flow targets.edm
    denoiser solvers.ddpm solvers.ddim solvers.dpmpp_2m solvers.heun solve sample guidance.classifier_free guidance.clip
    losses.denoising_loss models.UNet experiment.build load"""
    for name in names.split():
        thing = jd
        for part in name.split("."):
            thing = getattr(thing, part)
        assert callable(thing) and thing.__doc__, name
