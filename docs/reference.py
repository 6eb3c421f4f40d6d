"""Markdown pages of the API, from the syntax trees of the package: nothing is imported, so no torch is needed."""

import ast
import re
from functools import partial
from pathlib import Path

SECTION = re.compile(r"^(Args|Parameters|Returns|Raises|Example|Examples):$", re.MULTILINE)
TRAINERS = ("grpo", "dpo", "kto", "ppo", "prm", "async_grpo")
# What is public: names of modules below trl_ext, or of packages whose modules all are.
GROUPS = {
    "Trainers": [
        *(f"trainers.{name}.{file}" for name in TRAINERS for file in ("config", "trainer")),
        "trainers.shared_options",
        "trainers.grpo.implicit_prm",
        "trainers.dpo.samples",
        "registration",
    ],
    "Rewards and labels": ["rewards", "labels.config", "labels.run", "labels.sampling", "rejection_sampling"],
    "Mathematics": ["functional"],
}


def file(package: Path, module: str) -> Path:
    place = package / module.replace(".", "/")
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def modules(package: Path, name: str) -> list[str]:
    """A module, or those of a package and of the packages below it that define something public."""
    if file(package, name).name != "__init__.py":
        return [name]
    found = [path.relative_to(package) for path in sorted((package / name.replace(".", "/")).rglob("*.py"))]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in found]
    return [module for module in names if public(parsed(package, module))]


def parsed(package: Path, module: str) -> ast.Module:
    return ast.parse(file(package, module).read_text(encoding="utf-8"))


def public(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Functions, classes and methods with a docstring and a public name."""

    def walk(nodes, prefix=""):
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_" and ast.get_docstring(node):
                yield prefix + node.name, node
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body, f"{node.name}.")

    return list(walk(tree.body))


def defined(package: Path) -> set[str]:
    """Every name that a file of the package defines: functions, classes, methods, constants, fields."""
    names = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def renamed(tree: ast.Module) -> dict[str, str]:
    """Names that a file gives to what it imports from other libraries, and what they are called there."""
    return {
        alias.asname: f"{(node.module or '').partition('.')[0]}.{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and not node.level
        for alias in node.names
        if alias.asname
    }


def signature(name: str, node: ast.AST, names: dict[str, str]) -> str:
    """The line of a class or function; one argument per line where it would be long."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(names.get(base, base) for base in map(ast.unparse, node.bases))
        return f"class {name}({bases})" if bases else f"class {name}"
    arguments, returns = ast.unparse(node.args), f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if len(line := f"def {name}({arguments}){returns}") < 90:
        return line
    depth, parts = 0, [""]
    for char in arguments:  # commas inside of brackets stay
        depth += (char in "([{") - (char in ")]}")
        parts[-1] += char
        if char == "," and not depth:
            parts.append("")
    return "\n".join([f"def {name}(", *(f"    {part.strip()}" for part in parts), f"){returns}"])


def markdown(doc: str, link) -> str:
    """A docstring in Hugging Face's style as Markdown: formulas, references, lists of arguments."""
    doc = re.sub(r"\\{1,2}\((.+?)\\{1,2}\)", r"$\1$", doc, flags=re.DOTALL)
    doc = re.sub(r"\[`(~?)([\w.]+)`\](?!\()", lambda found: link(found[2], bool(found[1])), doc)
    doc = re.sub(r"(?<!\]\()(?<!<)(https?://[^\s)>,;]+)", r"<\1>", doc)
    head, *rest = SECTION.split(doc)
    text = [head.strip()]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        body = re.sub(r"^    ", "", body.strip("\n"), flags=re.MULTILINE)
        if title.startswith("Example"):
            examples = r"((?:^(?:>>>|\.\.\.).*\n?(?:^(?!>>>)\S.*\n?)*\n?)+)"
            body = re.sub(examples, r"```pycon\n\1\n```\n", body, flags=re.MULTILINE)
        elif title in ("Args", "Parameters"):
            body = re.sub(r"^(\S[^(:]*?)(?: \((.*)\))?:[ ]*$", argument, body, flags=re.MULTILINE)
        text += [f"**{title}**", body.strip()]
    return "\n\n".join(text)


def argument(found: re.Match) -> str:
    """`names (type, *optional*):` as an entry of a list."""
    names = found[1].replace(", ", "`**, **`")
    return f"\n* **`{names}`**" + (f" ({found[2]}):" if found[2] else ":")


def write(package: Path, folder: Path) -> list[str]:
    """One page per module into `folder`, and one of all; returns what is wrong: references to nothing."""
    warnings: list[str] = []
    groups = {title: [m for name in names for m in modules(package, name)] for title, names in GROUPS.items()}
    trees = {name: parsed(package, name) for names in groups.values() for name in names}
    found, somewhere = {name: public(tree) for name, tree in trees.items()}, defined(package)
    anchors = {
        (module, name): f"{module}.md#{name.lower().replace('.', '')}"
        for module, nodes in found.items()
        for name, _ in nodes
    }

    def link(module: str, name: str, only_last: bool) -> str:
        text = name.rpartition(".")[2] if only_last else name
        if only_last and not name.startswith("trl_ext."):
            return f"`{text}`"  # of another library
        wanted, place = (text, name.removeprefix("trl_ext.").rpartition(".")[0]) if only_last else (name, "")
        same = [key for key in anchors if key[1] == wanted and key[0].startswith(place)]
        here = [key for key in same if key[0] == module] or same
        if here:
            return f"[`{text}`]({anchors[here[0]]})"
        if wanted.rpartition(".")[2] not in somewhere:
            warnings.append(f"{module}: [`{name}`] is no name of the package")
        return f"`{text}`"

    folder.mkdir(exist_ok=True)
    for module, nodes in found.items():
        doc = ast.get_docstring(trees[module]) or ""
        page = [f"# {module}", markdown(doc, partial(link, module))]
        for name, node in nodes:
            page += [
                f"##{'#' * name.count('.')} `{name}`",
                f"```python\n{signature(name, node, renamed(trees[module]))}\n```",
                markdown(ast.get_docstring(node) or "", partial(link, module)),
            ]
        (folder / f"{module}.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    contents = ["# Reference", "From the docstrings; names below `trl_ext`."]
    for title, names in groups.items():
        contents += [f"## {title}", "```{toctree}\n:maxdepth: 1\n\n" + "\n".join(names) + "\n```"]
    (folder / "index.md").write_text("\n\n".join(contents) + "\n", encoding="utf-8")
    return warnings
