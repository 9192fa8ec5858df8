"""What setup_env.sh still has to do in an environment; run by that environment's python.

    python env_plan.py plan ROOT CONSTRAINTS OWN OUT   writes what is missing into the folder OUT
    python env_plan.py place STAGE SITE                moves a freshly unpacked detectron2 wheel into place

It installs nothing. The sources of truth are setup.py (ranges), requirements/constraints.txt (pins) and the
environment itself. Runs before anything is installed: standard library and pip only.
"""

import ast
import importlib
import importlib.metadata as metadata
import importlib.util
import json
import shutil
import sys
import warnings
from pathlib import Path
from urllib.parse import unquote, urlparse

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import InvalidVersion, Version

KEPT = ("torch", "torchvision", "numpy")  # never exchanged where they import, and neither is detectron2
WHEEL = "sal-detectron2"
MODULES = {"hydra-core": "hydra", "opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}


def read_ranges(setup_py: Path) -> tuple[list[Requirement], set[str]]:
    """Every requirement of setup.py, extras included, and the names of the dev tools among them."""
    lists = {}
    for node in ast.parse(setup_py.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in ("REQUIRES", "EXTRAS"):
            lists[node.targets[0].id] = ast.literal_eval(node.value)
    texts = lists["REQUIRES"] + [text for extra in lists["EXTRAS"].values() for text in extra]
    return [Requirement(text) for text in texts], {name_of(Requirement(t)) for t in lists["EXTRAS"]["dev"]}


def read_pins(constraints: Path) -> dict[str, Requirement]:
    """Canonical name -> pin, for the lines that speak of this Python."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    pins = [Requirement(line) for line in lines if line]
    return {name_of(pin): bare(pin) for pin in pins if pin.marker is None or pin.marker.evaluate()}


def bare(requirement: Requirement) -> Requirement:
    return Requirement(f"{requirement.name}{requirement.specifier}")


def name_of(requirement: Requirement) -> str:
    return canonicalize_name(requirement.name)


def read_installed() -> dict[str, str]:
    """Canonical name -> version of every distribution whose version pip can read."""
    found: dict[str, str] = {}
    for dist in metadata.distributions():
        name, version = dist.metadata["Name"], dist.metadata["Version"]
        try:
            Version(version or "")
        except InvalidVersion:
            continue
        if name:
            found.setdefault(canonicalize_name(name), version)
    return found


def import_error(module: str) -> str:
    """Why a module does not import; empty when it does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken build raises anything: ImportError, OSError, RuntimeError ...
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def is_missing(requirement: Requirement, installed: dict[str, str]) -> bool:
    """A distribution counts as there by its own name or, packed by others, by the module it brings."""
    name = name_of(requirement)
    module = MODULES.get(name, name.replace("-", "_"))
    return name not in installed and importlib.util.find_spec(module) is None


def is_outside(requirement: Requirement, version: str) -> bool:
    return not requirement.specifier.contains(version, prereleases=True)


def wheel_folder() -> str:
    """The detectron2 folder that belongs to the wheel; empty where the wheel is not installed."""
    try:
        return str(metadata.distribution(WHEEL).locate_file("detectron2"))
    except metadata.PackageNotFoundError:
        return ""


def installed_from(root: Path) -> bool:
    """Whether imgcls is installed, editable, from this checkout, and since setup.py last changed."""
    try:
        dist = metadata.distribution("imgcls")
    except metadata.PackageNotFoundError:
        return False
    origin = json.loads(dist.read_text("direct_url.json") or "{}")
    folder = Path(unquote(urlparse(origin.get("url", "")).path) or "/")
    written = Path(str(dist.locate_file(f"imgcls-{dist.version}.dist-info")))
    return (
        origin.get("dir_info", {}).get("editable", False)
        and folder.resolve() == root.resolve()
        and written.is_dir()
        and written.stat().st_mtime >= (root / "setup.py").stat().st_mtime
    )


class Plan:
    """The lists that setup_env.sh works off, one per step, and what there is to say."""

    def __init__(self, root: Path, constraints: Path, own: bool) -> None:
        self.root, self.own = root, own
        self.ranges, self.dev = read_ranges(root / "setup.py")
        self.pins = read_pins(constraints)
        self.installed = read_installed()
        self.errors = {name: import_error(name) for name in KEPT}
        self.kept = {name: self.installed.get(name) for name in KEPT if not self.errors[name]}
        self.torch: list[str] = []
        self.rest: list[str] = []
        self.detectron2: list[str] = []
        self.imgcls: list[str] = []
        self.stop: list[str] = []
        self.report: list[str] = []
        self.find_missing()
        self.find_detectron2()
        self.imgcls = [] if installed_from(root) else [str(root)]

    def find_missing(self) -> None:
        for requirement in self.ranges:
            name = name_of(requirement)
            outside = name in self.installed and is_outside(requirement, self.installed[name])
            ours = self.own and name not in self.kept
            if name in KEPT:
                if self.errors[name]:
                    self.torch.append(f"{requirement}  # {self.errors[name]}")
                    self.refuse_foreign_pair(name)
            elif is_missing(requirement, self.installed) or (ours and outside):
                self.rest.append(str(requirement))
            if outside and not ours:
                version = f"{name} {self.installed[name]}"
                tried = f"the range that was tried, {requirement.specifier}"
                self.report.append(f"{version} is outside {tried}; it stays as it is")
        if self.own:
            self.follow_pins()

    def follow_pins(self) -> None:
        """The checkout's own .venv is moved to the pins, except for what is never exchanged."""
        for name, pin in self.pins.items():
            if name in self.installed and name not in self.kept and is_outside(pin, self.installed[name]):
                self.rest.append(str(pin))

    def refuse_foreign_pair(self, name: str) -> None:
        """A torch from another index needs its torchvision from there: the two share compiled code."""
        version = self.installed.get("torch", "")
        if name == "torchvision" and "torch" in self.kept and "+" in version:
            label = version.split("+")[1]
            self.stop.append(
                f"torch {version} is a build from another index than PyPI, and its torchvision is missing or "
                f"broken ({self.errors[name]}). Take it from where torch came from, for example: "
                f"pip install torchvision --index-url https://download.pytorch.org/whl/{label}"
            )

    def find_detectron2(self) -> None:
        """Judged last: detectron2 cannot import before what it needs is there."""
        if self.torch or self.rest:
            return
        error = import_error("detectron2") or import_error("detectron2.modeling")
        spec = importlib.util.find_spec("detectron2") if error else None
        folder = str(Path(spec.origin).parent) if spec and spec.origin else ""
        if error and folder and folder != wheel_folder():
            self.stop.append(
                f"the detectron2 at {folder} does not import ({error}). It is not ours to repair: "
                "build it again for this torch, or uninstall it, and run this script again"
            )
        elif error:
            self.detectron2.append(error)
        else:
            where = Path(sys.modules["detectron2"].__file__ or "").parent
            version = self.installed.get(WHEEL, "")
            of_wheel = wheel_folder() == str(where)
            self.report.append(
                f"detectron2 in use: {where} ({f'the wheel {WHEEL} {version}' if of_wheel else 'your own'})"
            )

    def held(self) -> dict[str, str]:
        """What pip may not change: all that is installed; in our own .venv only torch, torchvision, numpy."""
        rules = {} if self.own else {name: f"{name}=={version}" for name, version in self.installed.items()}
        # What imports but is unknown to pip gets a version that exists nowhere: pip fails, adds no second.
        return rules | {name: f"{name}=={version or '0+unknown.to.pip'}" for name, version in self.kept.items()}

    def constraints(self) -> dict[str, str]:
        """What is held, and the pins: of everything in our own .venv, of the dev tools elsewhere."""
        pinned = self.pins.keys() if self.own else self.dev & self.pins.keys()
        return {name: str(self.pins[name]) for name in pinned} | self.held()

    def summary(self) -> str:
        versions = ", ".join(f"{name} {self.installed.get(name, '(unknown)')}" for name in KEPT)
        return f"ready: {sys.executable} (Python {sys.version.split()[0]}), {versions}"

    def write(self, out: Path) -> None:
        files = {step: getattr(self, step) for step in ("torch", "rest", "detectron2", "imgcls", "stop")}
        files["names"] = [Requirement(text).name for text in self.rest]
        files["held"] = sorted(self.held().values())
        files["constraints"] = sorted(self.constraints().values())
        files["report"] = [f"setup_env: {line}" for line in [*self.report, self.summary()]]
        for name, lines in files.items():
            (out / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def strip_wheel(stage: Path) -> None:
    """Drop what must not reach site-packages: code compiled for another torch, and a package named tools."""
    for library in (stage / "detectron2").glob("_C*.so"):
        library.unlink()
    for stray in ("tools", "bin"):
        shutil.rmtree(stage / stray, ignore_errors=True)
    for record in stage.glob("*.dist-info/RECORD"):
        lines = record.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if (stage / line.split(",")[0]).exists()]
        record.write_text("\n".join(kept) + "\n", encoding="utf-8")


def place(stage: Path, site: Path) -> None:
    """Move the stripped wheel into site-packages; the code last, so that a break shows as not importable."""
    strip_wheel(stage)
    for old in [*site.glob("sal_detectron2-*.dist-info"), site / "detectron2"]:
        shutil.rmtree(old, ignore_errors=True)
    for info in stage.glob("sal_detectron2-*.dist-info"):
        info.rename(site / info.name)
    (stage / "detectron2").rename(site / "detectron2")


def main(command: str, *rest: str) -> None:
    if sys.path[0] == str(Path(__file__).parent):  # nothing beside this script is to be imported
        del sys.path[0]
    warnings.simplefilter("ignore")
    if command == "place":
        stage, site = rest
        place(Path(stage), Path(site))
    else:
        root, constraints, own, out = rest
        Plan(Path(root), Path(constraints), own == "yes").write(Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
