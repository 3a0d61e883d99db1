"""The loopback Hub's API: repositories, preupload, LFS batch, commits and contents of revisions."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import yaml
from hub_repos import LFS_FROM_BYTES, Blob, Commit, Repo

if TYPE_CHECKING:
    from hub_server import HubServer

_DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def reply(value: Any, status: int = 200) -> Reply:
    """`value` as JSON."""
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def refuse(status: int, code: str, message: str, **headers: str) -> Reply:
    """Return an error as the Hub states it: in headers."""
    return Reply(
        status,
        json.dumps({"error": message}).encode(),
        {"X-Error-Code": code, "X-Error-Message": message} | headers,
    )


def lookup(
    hub: "HubServer", name: str, rest: str, may: bool | None, *, content: bool = False
) -> tuple[Commit, str, Blob] | Reply:
    """The commit, name and blob that `<revision>/<file>` means in a repository, or the refusal."""
    repo = find(hub, name, may)
    if isinstance(repo, Reply):
        return repo
    revision, _, file = rest.partition("/")
    revision, file = unquote(revision), unquote(file)
    commit = repo.at(revision)
    if commit is None:
        return refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    if content and repo.gated and not may:
        return refuse(
            403 if may is False else 401, "GatedRepo", f"Access to model {name} is restricted."
        )
    if file not in commit.files:
        return refuse(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.oid})
    return commit, file, commit.files[file]


def find(hub: "HubServer", name: str, may: bool | None) -> Repo | Reply:
    """Return the repository; as on the Hub, a private one does not exist for strangers."""
    repo = hub.repos.get(name)
    if may is False:
        return Reply(401, b'{"error":"Invalid credentials in Authorization header"}')
    if repo is None or (repo.private and not may):
        return refuse(404 if may else 401, "RepoNotFound", "Repository not found")
    return repo


def answer_api(hub: "HubServer", method: str, url: str, body: bytes, may: bool | None) -> Reply:
    """Answer every request but resolve. may: True if the token is right; None without a token."""
    path, _, query = url.partition("?")
    parts = path[1:].split("/")
    if parts[0] != "api":
        return _lfs(hub, path, json.loads(body), may)
    if parts[1:] == ["whoami-v2"]:
        known = {
            "name": "me",
            "type": "user",
            "orgs": [],
            "auth": {"accessToken": {"role": "write"}},
        }
        return reply(known) if may else Reply(401, b'{"error":"Invalid user token."}')
    if parts[1:] == ["validate-yaml"]:
        return _validate(json.loads(body)["content"])
    if method == "POST" and not may and parts[-2] != "paths-info":
        return Reply(401, b'{"error":"Invalid user token."}')
    if parts[1:] == ["repos", "create"]:
        return _create(hub, json.loads(body))
    repo = find(hub, f"{parts[2]}/{parts[3]}", may)
    if isinstance(repo, Reply):
        return repo
    return _answer_repo(hub, repo, parts[4:] or ["revision", "main"], parse_qs(query), body)


def _answer_repo(
    hub: "HubServer", repo: Repo, parts: list[str], query: dict[str, list[str]], body: bytes
) -> Reply:
    what, revision = parts[0], unquote(parts[1]) if len(parts) > 1 else "main"
    if what == "refs":
        branches = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.refs.items()
        ]
        return reply({"branches": branches, "converts": [], "tags": [], "pullRequests": []})
    if what == "branch":
        if revision in repo.refs:
            return refuse(409, "", f"Reference already exists: {revision}")
        repo.refs[revision] = json.loads(body).get("startingPoint") or repo.refs["main"]
        return reply({})
    commit = repo.at(revision)
    if commit is None:
        return refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    if what == "revision":
        return reply(_info(repo, commit, "blobs" in query))
    if what == "tree":
        folder = unquote("/".join(parts[2:]))
        deep = query.get("recursive") in (["true"], ["True"], ["1"])
        return reply(_tree(commit, folder, deep))
    if what == "paths-info":
        wanted = {w.rstrip("/") for w in parse_qs(body.decode())["paths"]}
        return reply([entry for entry in _tree(commit, "", True) if entry["path"] in wanted])
    if what == "preupload":
        return _preupload(commit, json.loads(body))
    if what == "commit":
        return _commit(
            hub,
            repo,
            revision,
            "create_pr" in query,
            [json.loads(line) for line in body.splitlines()],
        )
    return Reply(404, b"no such endpoint")


def _info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for path, blob in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            sibling |= {"size": blob.size, "blobId": blob.git_oid}
            if blob.lfs:
                sibling["lfs"] = {"size": blob.size, "sha256": blob.sha256, "pointerSize": 130}
        siblings.append(sibling)
    return {
        "_id": "0" * 24,
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.name.partition("/")[0],
        "sha": commit.oid,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "lastModified": _DATE,
        "createdAt": _DATE,
        "siblings": siblings,
    }


def _tree(commit: Commit, folder: str, deep: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        inner = path[len(prefix) :].split("/")
        for depth in range(1, len(inner) if deep else min(2, len(inner))):
            name = prefix + "/".join(inner[:depth])
            entries[name] = {
                "type": "directory",
                "oid": hashlib.sha1(name.encode()).hexdigest(),
                "size": 0,
                "path": name,
            }
        if deep or len(inner) == 1:
            entries[path] = {"type": "file", "oid": blob.git_oid, "size": blob.size, "path": path}
            if blob.lfs:
                entries[path]["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    return list(entries.values())


def _create(hub: "HubServer", wish: dict[str, Any]) -> Reply:
    name = f"{wish.get('organization') or 'me'}/{wish['name']}"
    url = {"url": f"{hub.url}/{name}", "name": name, "id": "0" * 24}
    if name in hub.repos:
        return reply(url | {"error": "You already created this model repo"}, 409)
    # huggingface_hub 1.3 says private, later versions say visibility.
    hub.repos[name] = Repo(name, private=wish.get("private", wish.get("visibility") == "private"))
    return reply(url)


def _validate(content: str) -> Reply:
    """Validate a model card: its metadata are valid YAML with the fields that the Hub checks."""
    if not content.startswith("---\n"):
        return reply(
            {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        )
    errors = []
    try:
        card = yaml.safe_load(content[4:].partition("\n---")[0])
        if not isinstance(card, dict):
            errors.append("metadata is not an object")
        else:
            if not isinstance(card.get("tags", []), list):
                errors.append('"tags" must be an array')
            if not isinstance(card.get("license", ""), str | list):
                errors.append('"license" must be a string')
            if card.get("base_model_relation") not in (
                None,
                "quantized",
                "finetune",
                "adapter",
                "merge",
            ):
                errors.append(
                    '"base_model_relation" must be one of [adapter, merge, quantized, finetune]'
                )
    except yaml.YAMLError as e:
        errors.append(str(e))
    return reply(
        {"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200
    )


def _preupload(commit: Commit, wish: dict[str, Any]) -> Reply:
    files = []
    for file in wish["files"]:
        assert len(base64.b64decode(file["sample"])) <= 512
        lfs = file["path"].endswith(".safetensors") or file["size"] >= LFS_FROM_BYTES
        old = commit.files.get(file["path"])
        mode = "lfs" if lfs else "regular"
        files.append(
            {
                "path": file["path"],
                "uploadMode": mode,
                "shouldIgnore": False,
                "oid": old.etag if old else None,
            }
        )
    return reply({"files": files, "commitOid": commit.oid})


def _lfs(hub: "HubServer", path: str, wish: dict[str, Any], may: bool | None) -> Reply:
    """Answer the batch call, and the calls after an upload."""
    name, _, rest = path[1:].partition(".git/info/lfs/")
    repo = find(hub, name, may)
    if isinstance(repo, Reply) or not may:
        return repo if isinstance(repo, Reply) else Reply(401, b"")
    known = {
        b.sha256
        for r in hub.repos.values()
        for c in r.commits.values()
        for b in c.files.values()
        if b.lfs
    }
    if rest == "verify":
        content = hub.objects.get(wish["oid"])
        good = (
            content is not None
            and hashlib.sha256(content).hexdigest() == wish["oid"]
            and len(content) == wish["size"]
        )
        return reply({} if good else {"error": "the object was not uploaded"}, 200 if good else 422)
    assert rest == "objects/batch" and wish["hash_algo"] == "sha256"
    objects = []
    for wanted in wish["objects"]:
        action: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in known:
            upload = {"href": f"{hub.cdn}/{name}/upload/{wanted['oid']}?X-Signature=secret"}
            verify = {"href": f"{hub.url}/{name}.git/info/lfs/verify"}
            action["actions"] = {"upload": upload, "verify": verify}
        objects.append(action)
    return reply({"transfer": "basic", "objects": objects})


def _commit(
    hub: "HubServer", repo: Repo, ref: str, pull: bool, lines: list[dict[str, Any]]
) -> Reply:
    """Takes the operations of an ndjson body, all or none."""
    head = repo.at(ref)
    assert head and lines[0]["key"] == "header"
    header = lines[0]["value"]
    if header.get("parentCommit") not in (None, head.oid):
        return refuse(412, "", "A commit has happened since. Please refresh and try again.")
    known = {
        b.sha256: b
        for r in hub.repos.values()
        for c in r.commits.values()
        for b in c.files.values()
        if b.lfs
    }
    files = dict(head.files)
    for line in lines[1:]:
        key, value = line["key"], line["value"]
        path = value["path"]
        if key == "file":
            files[path] = Blob.of(base64.b64decode(value["content"]), path)
        elif key == "lfsFile":
            blob = known.get(value["oid"])
            if blob is None and value["oid"] not in hub.objects:
                return refuse(
                    400, "", f"LFS pointer pointed to a file that does not exist: {value['oid']}"
                )
            files[path] = blob or Blob.of(hub.objects[value["oid"]], path)
        elif key == "deletedFile":
            del files[path]
        elif key == "deletedFolder":
            files = {
                name: blob
                for name, blob in files.items()
                if not name.startswith(path.rstrip("/") + "/")
            }
        else:
            return refuse(400, "", f"unknown operation {key}")
    number = sum(name.startswith("refs/pr/") for name in repo.refs) + 1
    if pull:
        ref = f"refs/pr/{number}"
        repo.refs[ref] = head.oid
    commit = repo.commit(ref, files, header["summary"])
    pull_url = f"{hub.url}/{repo.name}/discussions/{number}" if pull else None
    url = f"{hub.url}/{repo.name}/commit/{commit.oid}"
    return reply(
        {
            "success": True,
            "commitUrl": url,
            "commitOid": commit.oid,
            "hookOutput": "",
            "pullRequestUrl": pull_url,
        }
    )
