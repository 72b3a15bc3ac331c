"""Building and installing: with every tool, without each of them, and with tools that do not work."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

NOT_ASKED = "not asked for; a GPU without Triton needs it (ROPE_DIST_CUDA=1)"
VARIABLES = ("CXX", "CUDA_HOME", "PYTHONPATH", "ARCHFLAGS")

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the stand-ins for compilers are shell scripts"
)


@pytest.fixture
def source(tmp_path):
    """The sources as a clone has them: nothing built."""
    copy = tmp_path / "source"
    built = shutil.ignore_patterns("*.so", "build.json", "__pycache__")
    for name in ("rope_dist", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def tools(tmp_path):
    """A folder of stand-ins that alone is searched for programs; ``tools(name, script)`` puts one there."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def put(name, script):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
        return folder / name

    put.folder = folder
    return put


COMPILER = """#!/bin/sh
# Writes its own arguments where a compiler would write an object or a library; those of every run stay in a file.
arguments="$*"
echo "$arguments" >>"$0.runs"
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then echo "$arguments" >"$2"; fi
    shift
done
"""


def environment(tools, **more):
    """Only those tools and what is given, whatever this machine has."""
    own = {k: v for k, v in os.environ.items() if k not in VARIABLES and not k.startswith("ROPE_DIST_")}
    return {**own, "PATH": str(tools.folder), **{k: str(v) for k, v in more.items()}}


def run(arguments, source, env):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=source,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def build(source, env):
    """What a build in place says of each library, and what it prints."""
    done = run(["setup.py", "-q", "build_ext", "--inplace"], source, env)
    status = json.loads((source / "rope_dist" / "_native" / "build.json").read_text())
    for name, text in status.items():
        library = source / "rope_dist" / "_native" / f"librope_dist_{name}{SUFFIX}"
        assert library.exists() == (text == "built")
    warnings = [line for line in done.stderr.splitlines() if "rope_dist is built without" in line]
    quiet = ("built", NOT_ASKED, "ROPE_DIST_CUDA=0", "ROPE_DIST_CUDA_ARCHS is empty")
    assert len(warnings) == sum(text not in quiet for text in status.values())
    return status, warnings


INSTALLED = """
import json, warnings
from rope_dist import ops
from rope_dist.info import info
import rope_dist, torch
x, t = torch.randn(1, 2, 1, 4), torch.ones(1, 2, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        q, k = ops.rotary(x, x, t, 0 * t)
assert torch.equal(q, x) and torch.equal(k, x)
found = info()
print(json.dumps({
    "from": rope_dist.__file__, "warnings": [str(w.message) for w in caught],
    "cpu": found["native libraries"]["CPU library"], "cuda": found["native libraries"]["CUDA library"],
    "used": found["backends"]["cpu"],
}))
"""


def installed(folder, tmp_path):
    """What a process says that sees that installation."""
    env = {**os.environ, "PYTHONPATH": str(folder), "ROPE_DIST_NATIVE_DIR": "", "ROPE_DIST_BACKEND": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["from"]).is_relative_to(folder)
    return found


def install(source, target, env):
    pytest.importorskip("pip")
    run(["-m", "pip", "install", "--quiet", *OFFLINE, "--target", target, source], source, env)


class TestInstall:
    """The three clones of which each lacks something: they install, work, and say what they lack."""

    def test_without_any_compiler(self, source, tools, tmp_path):
        install(source, tmp_path / "site", environment(tools))
        found = installed(tmp_path / "site", tmp_path)
        assert found["cpu"] == "not built: no C++ compiler (c++, g++ or clang++; CXX names another)"
        assert found["cuda"] == f"not built: {NOT_ASKED}"
        assert found["used"].startswith("reference for")
        (warning,) = found["warnings"]
        assert "no C++ compiler" in warning

    def test_with_a_broken_compiler(self, source, tools, tmp_path):
        broken = tools("c++", "#!/bin/sh\necho 'cc1plus: fatal error: no such file' >&2\nexit 1\n")
        tools("nvcc", "#!/bin/sh\necho 'nvcc fatal   : no host compiler'\nexit 1\n")
        install(source, tmp_path / "site", environment(tools, ROPE_DIST_CUDA=1))
        found = installed(tmp_path / "site", tmp_path)
        assert found["cpu"] == f"not built: {broken.name} failed (cc1plus: fatal error: no such file)"
        assert found["cuda"].endswith("nvcc failed (nvcc fatal   : no host compiler)")
        assert len(found["warnings"]) == 1

    @pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
    def test_without_nvcc(self, source, tools, tmp_path):
        # The compiler's own programs are where it looks for them; it is all of this machine that is found.
        tools("c++", f'#!/bin/sh\nPATH={os.environ["PATH"]}\nexec {shutil.which("g++")} "$@"\n')
        install(source, tmp_path / "site", environment(tools, ROPE_DIST_CUDA=1))
        found = installed(tmp_path / "site", tmp_path)
        assert found["cpu"].startswith("yes, gcc")
        assert found["cuda"] == "not built: no nvcc (PATH, CUDA_HOME)"
        assert found["used"].startswith("native for float32")
        assert found["warnings"] == []


class TestBuild:
    """``build_ext``, whose compilers are stand-ins: what it runs, and what it says where they fail."""

    @pytest.mark.parametrize(
        ("given", "cpu", "cuda"),
        [
            ({"CXX": "/no/such/c++"}, "CXX=/no/such/c++ is not found", NOT_ASKED),
            ({"CXX": "/bin/false"}, "/bin/false failed", NOT_ASKED),
            ({"CXX": "/bin/true"}, "/bin/true failed", NOT_ASKED),
            ({"CXX": "'"}, "CXX=': No closing quotation", NOT_ASKED),
            ({"ROPE_DIST_CUDA": "1"}, "no C++ compiler", "no nvcc (PATH, CUDA_HOME)"),
            ({"ROPE_DIST_CUDA_ARCHS": "90"}, "no C++ compiler", "no nvcc (PATH, CUDA_HOME)"),
            ({"ROPE_DIST_CUDA": "1", "CUDA_HOME": "/no/cuda"}, "no C++ compiler", "no nvcc in /no/cuda/bin"),
            (
                {"ROPE_DIST_CUDA_ARCHS": "sm_90"},
                "no C++ compiler",
                "ROPE_DIST_CUDA_ARCHS=sm_90 is not numbers",
            ),
        ],
    )
    def test_what_is_missing_is_one_line_each(self, source, tools, given, cpu, cuda):
        status, warnings = build(source, environment(tools, **given))
        assert cpu in status["cpu"]
        assert cuda in status["cuda"]
        for kind, name in (("CPU", "cpu"), ("CUDA", "cuda")):
            line = f"warning: rope_dist is built without its native {kind} library: {status[name]}"
            assert (line in warnings) == (status[name] != NOT_ASKED)

    @pytest.mark.parametrize(
        ("given", "status"),
        [
            ({}, NOT_ASKED),
            ({"ROPE_DIST_CUDA": ""}, NOT_ASKED),
            ({"ROPE_DIST_CUDA": "0", "ROPE_DIST_CUDA_ARCHS": "90"}, "ROPE_DIST_CUDA=0"),
            ({"ROPE_DIST_CUDA": "1", "ROPE_DIST_CUDA_ARCHS": ""}, "ROPE_DIST_CUDA_ARCHS is empty"),
            ({"ROPE_DIST_CUDA": "1"}, "built"),
            ({"ROPE_DIST_CUDA_ARCHS": "90"}, "built"),
        ],
    )
    def test_the_cuda_library_is_built_on_request(self, source, tools, given, status):
        nvcc = tools("nvcc", COMPILER)
        tools("c++", COMPILER)
        found, warnings = build(source, environment(tools, **given))
        assert found == {"cpu": "built", "cuda": status}
        assert warnings == []
        assert Path(f"{nvcc}.runs").exists() == (status == "built")

    @pytest.mark.parametrize("name", ["ROPE_DIST_CUDA", "ROPE_DIST_PURE"])
    def test_a_switch_is_0_or_1(self, source, tools, name):
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=source,
            env=environment(tools, **{name: "yes"}),
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (1, f"{name}=yes is neither 0 nor 1\n")

    def test_an_old_setuptools_is_one_line(self, source, tools, tmp_path):
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "setuptools.py").write_text('__version__ = "65.5.0"')
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=source,
            env=environment(tools, PYTHONPATH=tmp_path / "old"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr == "rope_dist is built with setuptools 77 or later, here is 65.5.0\n"

    def test_a_compiler_of_another_machine(self, source, tools):
        other = tools("c++", "\x7fELF of another machine")
        status, _ = build(source, environment(tools))
        assert status["cpu"].startswith((f"{other.name} cannot be run: ", f"{other.name} failed"))

    def test_an_older_library_does_not_outlive_a_failure(self, source, tools):
        tools("c++", COMPILER)
        assert build(source, environment(tools))[0]["cpu"] == "built"
        tools("c++", "#!/bin/sh\nexit 1\n")
        os.utime(source / "csrc" / "rotary.h")
        assert build(source, environment(tools))[0]["cpu"] == "c++ failed"

    def test_built_again_only_for_other_sources_or_another_command(self, source, tools):
        compiler = tools("c++", COMPILER)
        nvcc = tools("nvcc", COMPILER)
        runs = [Path(f"{tool}.runs") for tool in (compiler, nvcc)]

        def count(archs):
            for file in runs:
                file.write_text("")
            env = environment(tools, ROPE_DIST_CUDA_ARCHS=archs)
            assert build(source, env)[0] == {"cpu": "built", "cuda": "built"}
            return [len(file.read_text().splitlines()) for file in runs]

        # One run for each source, and one to link.
        assert count("90") == [5, 4]
        assert count("90") == [0, 0]
        assert count("80 90") == [0, 4]
        later = 2 + (source / "rope_dist/_native" / f"librope_dist_cuda{SUFFIX}").stat().st_mtime
        os.utime(source / "csrc" / "rotary_threads.h", (later, later))
        assert count("80 90") == [0, 4]

    def test_both_libraries_are_built_at_the_same_time(self, source, tools):
        """Each compiler waits for the other to start: one after the other neither would end."""
        for name, other in (("c++", "nvcc"), ("nvcc", "c++")):
            waits = (
                f'#!/bin/sh\n: >"$0.started"\nn=0\nwhile [ ! -e "{tools.folder / other}.started" ]; do\n'
                "n=$((n + 1)); [ $n -gt 200 ] && exit 1; /bin/sleep 0.1; done\n"
            )
            tools(name, waits + COMPILER.removeprefix("#!/bin/sh\n"))
        status, _ = build(source, environment(tools, ROPE_DIST_CUDA_ARCHS="90"))
        assert status == {"cpu": "built", "cuda": "built"}

    @pytest.mark.parametrize(
        ("given", "known", "expected"),
        [
            (None, "80 90 100 120", ["sm_80", "sm_90", "sm_100", "[sm_120,compute_120]"]),
            (None, "50 80 89 90", ["sm_80", "[sm_90,compute_90]"]),
            (None, "", ["sm_80", "sm_90", "sm_100", "[sm_120,compute_120]"]),
            ("8.6, 9.0;75", "80", ["sm_75", "sm_86", "[sm_90,compute_90]"]),
        ],
    )
    def test_architectures_are_those_asked_for_or_those_that_nvcc_knows(
        self, source, tools, given, known, expected
    ):
        lists = f'#!/bin/sh\nif [ "$1" = --list-gpu-arch ]; then for n in {known}; do echo compute_$n; done; exit; fi\n'
        home = tools.folder.parent / "cuda"
        (home / "bin").mkdir(parents=True)
        tools("nvcc", lists + COMPILER.removeprefix("#!/bin/sh\n")).rename(home / "bin" / "nvcc")
        archs = {"ROPE_DIST_CUDA": 1} if given is None else {"ROPE_DIST_CUDA_ARCHS": given}
        build(source, environment(tools, CUDA_HOME=home, **archs))
        command = (source / "rope_dist/_native" / f"librope_dist_cuda{SUFFIX}").read_text()
        assert [w.partition("code=")[2] for w in command.split() if "code=" in w] == expected

    @pytest.mark.parametrize(
        ("compiler", "host"),
        [("g++-12", "-ccbin g++-12"), ("g++-12 -m64", "-ccbin g++-12"), ("ccache g++-12", None)],
    )
    def test_nvcc_takes_the_same_host_compiler(self, source, tools, compiler, host):
        for name in ("g++-12", "ccache", "nvcc"):
            tools(name, COMPILER)
        build(source, environment(tools, CXX=compiler, ROPE_DIST_CUDA=1))
        command = (source / "rope_dist/_native" / f"librope_dist_cuda{SUFFIX}").read_text()
        assert (host in command) if host else ("-ccbin" not in command)


@pytest.fixture
def setup_py(monkeypatch):
    """``setup_py(platform, **environment)``: the functions of setup.py there, and what it hands to setuptools."""
    import setuptools
    import setuptools.command.bdist_wheel
    import setuptools.command.build_ext

    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith("ROPE_DIST_"))]:
        monkeypatch.delenv(name, raising=False)

    def run(platform="linux", **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "platform", platform)
        return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")), given=given)

    return run


class TestPlatforms:
    @pytest.mark.parametrize("platform", ["linux", "darwin"])
    def test_no_flag_is_of_one_processor_or_of_openmp(self, setup_py, platform):
        """A library that is built on a machine with AVX-512 runs on one without, and clang of macOS has no OpenMP."""
        line = setup_py(platform, CXX=sys.executable).cpu_command()
        assert [flag for flag in line if flag.startswith(("-m", "-fopenmp", "-Xpreprocessor"))] == []
        assert {"-std=c++17", "-fPIC", "-ffp-contract=off"} <= set(line)

    def test_macos_builds_for_the_processors_that_the_wheel_is_for(self, setup_py):
        here = setup_py("darwin", CXX=sys.executable, ARCHFLAGS="-arch arm64")
        assert here.cpu_command()[-2:] == ["-arch", "arm64"]
        assert here.SUFFIX == ".dylib"
        assert "-arch" not in setup_py("linux", CXX=sys.executable, ARCHFLAGS="-arch arm64").cpu_command()

    @pytest.mark.parametrize(
        ("platform", "given", "built"),
        [
            ("win32", {}, 0),
            ("win32", {"ROPE_DIST_PURE": "0"}, 2),
            ("linux", {}, 2),
            ("linux", {"ROPE_DIST_PURE": ""}, 2),
            ("linux", {"ROPE_DIST_PURE": "1"}, 0),
            ("darwin", {}, 2),
        ],
    )
    def test_where_the_package_is_pure(self, setup_py, platform, given, built):
        assert len(setup_py(platform, **given).given["ext_modules"]) == built


class TestReadme:
    """An index shows the README without the repository's files."""

    def test_without_a_page_it_is_as_it_is(self, setup_py):
        given = setup_py().given
        assert given["long_description"] == (ROOT / "README.md").read_text(encoding="utf-8")
        assert given["project_urls"] == {}

    def test_with_a_page_no_link_is_relative(self, setup_py):
        from rope_dist import __version__

        given = setup_py(ROPE_DIST_URL="https://example.org/owner/name/").given
        text, here = given["long_description"], "https://example.org/owner/name"
        links = re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", text)
        assert [link for _, link in links if not link.startswith(("#", "https:"))] == []
        pictures = [link for mark, link in links if mark]
        assert f"{here}/raw/v{__version__}/benchmarks/plots/perplexity.svg" in pictures
        assert f"{here}/blob/v{__version__}/CONTRIBUTING.md" in [link for _, link in links]
        for _, link in links:
            if link.startswith(here):
                path = link.removeprefix(f"{here}/").split("/", 2)[2].partition("#")[0]
                assert (ROOT / path).exists(), path
        assert given["project_urls"]["Repository"] == here


class TestArchives:
    def test_a_pure_wheel_is_for_every_platform(self, source, tools, tmp_path):
        """No compiler is asked, and a library that lies in the clone is left where it is."""
        pytest.importorskip("pip")
        compiler = tools("c++", COMPILER)
        build(source, environment(tools))
        Path(f"{compiler}.runs").unlink()
        arguments = ["-m", "pip", "wheel", "--quiet", *OFFLINE, "-w", tmp_path / "dist", source]
        run(arguments, source, environment(tools, ROPE_DIST_PURE=1))
        (wheel,) = (tmp_path / "dist").iterdir()
        assert wheel.name.endswith("-py3-none-any.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            (meta,) = (name for name in names if name.endswith("/WHEEL"))
            assert "Root-Is-Purelib: true" in archive.read(meta).decode()
        assert [n for n in names if n.startswith("rope_dist/_native/")] == ["rope_dist/_native/__init__.py"]
        assert {"rope_dist/py.typed", "rope_dist/hf/rotary_forms.json"} <= set(names)
        assert not Path(f"{compiler}.runs").exists()

    def test_torch_is_all_that_the_operators_require(self, source, tools, tmp_path):
        """The metadata that an index and pip read, of the wheel itself."""
        metadata = pytest.importorskip("packaging.metadata")
        run(
            ["-m", "pip", "wheel", "-q", *OFFLINE, "-w", tmp_path / "dist", source],
            source,
            environment(tools, ROPE_DIST_PURE=1),
        )
        (wheel,) = (tmp_path / "dist").iterdir()
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
            found = metadata.Metadata.from_email(archive.read(name), validate=True)
        always = {r.name for r in found.requires_dist if r.marker is None}
        assert always == {"torch"}

        def extra(name):
            """What ``pip install rope-dist[name]`` requires, with the extras within."""
            names, left = set(), [name]
            while left:
                one = left.pop()
                for r in found.requires_dist:
                    if r.marker is not None and r.marker.evaluate({"extra": one}):
                        names.add(r.name)
                        left += r.extras if r.name == "rope-dist" else ()
            return names

        hf = {"transformers", "tabulate", "tqdm", "typer"}
        assert extra("hf") == hf
        for name in set(found.provides_extra) - {"hf"}:
            assert hf <= extra(name), name
        assert "Typing :: Typed" in found.classifiers
        assert found.description_content_type == "text/markdown"
        assert found.description.startswith("# rope_dist")

    def test_a_wheel_serves_every_python_of_one_platform(self, source, tools, tmp_path):
        pytest.importorskip("pip")
        tools("c++", COMPILER)
        files_of_package = {str(f.relative_to(source)) for f in source.glob("rope_dist/**/*") if f.is_file()}
        run(
            ["-m", "pip", "wheel", "--quiet", *OFFLINE, "-w", tmp_path / "dist", source],
            source,
            environment(tools),
        )
        (wheel,) = (tmp_path / "dist").iterdir()
        name, version, python, abi, platform = wheel.stem.split("-")
        assert (name, python, abi) == ("rope_dist", "py3", "none")
        assert platform != "any"
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            assert "Root-Is-Purelib: false" in archive.read(f"{name}-{version}.dist-info/WHEEL").decode()
        native = {n for n in names if n.startswith("rope_dist/_native/")}
        files = ("__init__.py", "build.json", f"librope_dist_cpu{SUFFIX}")
        assert native == {f"rope_dist/_native/{file}" for file in files}
        assert {"rope_dist/py.typed", "rope_dist/hf/rotary_forms.json"} <= files_of_package <= names
        assert {n.split("/")[0] for n in names} == {"rope_dist", f"{name}-{version}.dist-info"}

    def test_a_source_distribution_is_complete_and_builds(self, tools, tmp_path):
        """Every file that git tracks is in it, and nothing that was built; a wheel can be made of it."""
        tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
        if tracked.returncode:
            pytest.skip("no clone")
        # A copy: untracked files of the working tree are no part of this.
        files = {f for f in tracked.stdout.splitlines() if (ROOT / f).exists()}
        copy = tmp_path / "clone"
        for file in files:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
        tools("c++", COMPILER)
        build(copy, environment(tools))
        run(["setup.py", "-q", "sdist", "-d", tmp_path / "dist"], copy, environment(tools))
        (archive,) = (tmp_path / "dist").iterdir()
        with tarfile.open(archive) as packed:
            inside = {m.name.partition("/")[2] for m in packed.getmembers() if m.isfile()}
            packed.extractall(tmp_path / "unpacked", filter="data")
        assert files - inside == {".gitignore"}
        made = {f for f in inside - files if "egg-info" not in f}
        assert made == {"PKG-INFO", "setup.cfg"}
        (unpacked,) = (tmp_path / "unpacked").iterdir()
        assert build(unpacked, environment(tools))[0]["cpu"] == "built"

    def test_an_editable_installation_builds_into_the_clone(self, source, tools, tmp_path):
        pytest.importorskip("pip")
        tools("c++", COMPILER)
        target = tmp_path / "site"
        run(
            ["-m", "pip", "install", "-q", *OFFLINE, "--target", target, "-e", source],
            source,
            environment(tools),
        )
        assert (source / "rope_dist/_native" / f"librope_dist_cpu{SUFFIX}").exists()
        assert json.loads((source / "rope_dist/_native/build.json").read_text())["cpu"] == "built"
