//! Links in the documentation, and references to it elsewhere, have existing targets.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::generated::repository;

/// Files below a folder, as paths from the repository's root, without build output and downloads.
fn files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(repository().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let path = folder.join(&name);
            if entry.file_type().unwrap().is_file() {
                found.push(path);
            } else if entry.file_type().unwrap().is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            }
        }
    }
    found
}

fn pages() -> BTreeMap<PathBuf, String> {
    let is_page = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    let read = |path: PathBuf| (path.clone(), fs::read_to_string(repository().join(path)).unwrap());
    files("").into_iter().filter(is_page).map(read).collect()
}

/// Removes code blocks and code spans.
fn prose(page: &str) -> String {
    let outside = page.split("\n```").step_by(2).collect::<Vec<_>>().join("\n");
    outside.split('`').step_by(2).collect::<Vec<_>>().join("`")
}

/// Targets of the links in a page.
fn links(page: &str) -> Vec<String> {
    let prose = prose(page);
    let targets = prose.split("](").skip(1).map(|rest| rest.split(')').next().unwrap().to_owned());
    targets.filter(|target| !target.contains("://") && !target.starts_with("mailto:")).collect()
}

/// Anchors of a page's headings, as GitHub makes them.
fn anchors(page: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let outside = page.split("\n```").step_by(2).collect::<Vec<_>>().join("\n");
    for heading in outside.lines().filter(|line| line.starts_with('#')) {
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = text.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let more = (1..).map(|number| format!("{anchor}-{number}"));
        let free = std::iter::once(anchor.clone()).chain(more).find(|name| !anchors.contains(name));
        anchors.insert(free.unwrap());
    }
    anchors
}

/// Resolves `..` in a path.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => assert!(plain.pop(), "{} leaves the repository", path.display()),
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

#[test]
fn every_link_in_the_documentation_leads_to_a_file_and_an_anchor() {
    let pages = pages();
    let mut broken = Vec::new();
    let mut count = 0;
    for (path, page) in &pages {
        for link in links(page) {
            count += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match file {
                "" => path.clone(),
                _ => plain(&path.parent().unwrap().join(file)),
            };
            let is_there = repository().join(&target).exists();
            let has_anchor =
                anchor.is_empty() || pages.get(&target).is_some_and(|page| anchors(page).contains(anchor));
            if !is_there || !has_anchor {
                broken.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
    assert!(count > 100, "{count} links");
}

#[test]
fn every_page_is_in_the_index() {
    let pages = pages();
    let index = Path::new("docs/README.md");
    let listed: BTreeSet<PathBuf> =
        links(&pages[index]).iter().map(|link| plain(&Path::new("docs").join(link))).collect();
    for path in pages.keys().filter(|path| path.starts_with("docs") && *path != index) {
        let folder_index = path.parent().unwrap().join("README.md");
        assert!(listed.contains(path) || listed.contains(&folder_index), "{} is not listed", path.display());
    }
}

#[test]
fn every_page_that_code_and_rules_mention_is_there() {
    let pages = pages();
    let mut count = 0;
    let folders = ["src", "tests", "dev", "ops", "benches", "config"];
    for path in folders.into_iter().flat_map(files).chain([PathBuf::from("Makefile")]) {
        let Ok(text) = fs::read_to_string(repository().join(&path)) else { continue };
        for (at, _) in text.match_indices("docs/") {
            let rest = &text[at..];
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "/._-#".contains(c)));
            let mention = rest[..end.unwrap_or(rest.len())].trim_end_matches('.');
            let (page, anchor) = mention.split_once('#').unwrap_or((mention, ""));
            if !page.ends_with(".md") {
                continue;
            }
            count += 1;
            let found = pages.get(Path::new(page));
            let is_there = found.is_some_and(|page| anchor.is_empty() || anchors(page).contains(anchor));
            assert!(is_there, "{} mentions {mention}, which does not exist", path.display());
        }
    }
    assert!(count > 20, "{count} mentions");
}

#[test]
fn every_constant_that_the_limits_name_exists() {
    let page = fs::read_to_string(repository().join("docs/reference/limits.md")).unwrap();
    let sources: String = files("src")
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .map(|path| fs::read_to_string(repository().join(path)).unwrap())
        .collect();
    let is_constant =
        |name: &&str| name.len() > 3 && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
    let names: BTreeSet<&str> = page.split('`').skip(1).step_by(2).filter(is_constant).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        let is_there = ["const", "static"].iter().any(|kind| sources.contains(&format!("{kind} {name}:")));
        assert!(is_there, "docs/reference/limits.md names {name}, which does not exist");
    }
}
