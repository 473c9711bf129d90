import re
from pathlib import Path

from jaxdiff import solvers

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_documents_name_every_solver_and_every_config():
    described = (ROOT / "docs" / "solvers.md").read_text().split("\n## ")[0]  # what follows has tables of what was measured
    table = re.findall(r"^\| `(\w+)` \|", described, re.M)
    assert sorted(table) == sorted(solvers.__all__)
    assert f"has all {len(table)}, with sources" in README
    configs = {p.stem for p in (ROOT / "configs").glob("*.py")}
    firsts = re.findall(r"^\|((?: `\w+`,?)+) \|", README, re.M)  # a row may be of a first stage and what diffuses its latents
    assert configs == set(re.findall(r"`(\w+)`", " ".join(firsts))) - set(solvers.__all__)


def test_links_and_pictures_in_the_documents_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_library_example_runs():
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "jd.schedules.edm" in block)
    names: dict = {}
    exec(code, names)
    assert names["x0"].shape == (4, 32, 32, 3) and bool(abs(names["x0"]).max() < 10)


def test_the_ledger_has_every_config_and_configs_point_there():
    ledger = (ROOT / "docs" / "results.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", ledger, re.M))
    configs = {p.stem: p.read_text() for p in (ROOT / "configs").glob("*.py")}
    assert rows.keys() == configs.keys()
    for name, text in configs.items():
        published, measured = rows[name].split(" | ")
        assert published and ("not measured yet" in measured or re.search(r"\d", measured)), name
        described = text.split('"""')[1]
        assert "Expected and measured: docs/results.md." in described
        assert not re.search(r"FID \d|\d bits/dim|\d%", described), f"{name} states a result"


def test_the_readme_states_no_result_of_a_config():
    assert not re.search(r"FID\W+\d|\d bits/dim|\d%? right|label as asked", README)
