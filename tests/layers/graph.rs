//! Which module of a crate uses which, by its source: imports with their re-exports, paths, and paths in macros.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Item, ItemMod, ItemUse, UseTree};

/// Files by their path below `src`.
pub struct Sources(BTreeMap<String, String>);

impl Sources {
    pub fn of(files: &[(&str, &str)]) -> Sources {
        Sources(files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect())
    }

    pub fn read(src: &Path) -> Sources {
        let mut files = BTreeMap::new();
        let mut folders = vec![src.to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|end| end == "rs") {
                    let name = path.strip_prefix(src).unwrap().to_str().unwrap().to_owned();
                    files.insert(name, std::fs::read_to_string(&path).unwrap());
                }
            }
        }
        Sources(files)
    }

    fn of_module(&self, module: &[String]) -> Option<&str> {
        let path = module.join("/");
        let names = match module {
            [] => vec!["lib.rs".to_owned()],
            _ => vec![format!("{path}.rs"), format!("{path}/mod.rs")],
        };
        names.iter().find_map(|name| self.0.get(name)).map(String::as_str)
    }
}

type ModulePath = Vec<String>;

/// A module: names that it imports, children, and everything that it mentions.
#[derive(Default)]
struct Module {
    children: Vec<String>,
    /// Local name to the path as it is written.
    imports: BTreeMap<String, Vec<String>>,
    globs: Vec<Vec<String>>,
    mentions: BTreeSet<Vec<String>>,
}

fn is_of_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.meta.require_list().is_ok_and(|list| list.tokens.to_string() == "test")
    })
}

impl Module {
    fn import(&mut self, mut prefix: Vec<String>, tree: &UseTree) {
        match tree {
            UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.import(prefix, &path.tree);
            }
            UseTree::Name(name) if name.ident == "self" => {
                self.imports.insert(prefix.last().unwrap().clone(), prefix);
            }
            UseTree::Name(name) => {
                prefix.push(name.ident.to_string());
                self.imports.insert(name.ident.to_string(), prefix);
            }
            UseTree::Rename(rename) => {
                if rename.ident != "self" {
                    prefix.push(rename.ident.to_string());
                }
                self.imports.insert(rename.rename.to_string(), prefix);
            }
            UseTree::Glob(_) => self.globs.push(prefix),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(prefix.clone(), tree)),
        }
    }

    /// Paths in the tokens of a macro.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match &token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.mention(std::mem::take(&mut path));
                    }
                    path.push(ident.to_string());
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => {
                    colons += 1;
                    continue;
                }
                TokenTree::Group(group) => {
                    self.mention(std::mem::take(&mut path));
                    self.tokens(group.stream());
                }
                _ => self.mention(std::mem::take(&mut path)),
            }
            colons = 0;
        }
        self.mention(path);
    }

    fn mention(&mut self, path: Vec<String>) {
        if !path.is_empty() {
            self.mentions.insert(path);
        }
    }
}

/// Reads one module; inline modules count as part of it.
struct Reader<'m> {
    module: &'m mut Module,
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Mod(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Const(item) => &item.attrs,
            Item::Static(item) => &item.attrs,
            Item::Struct(item) => &item.attrs,
            _ => &Vec::new(),
        };
        if !is_of_tests(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        match &item.content {
            None => self.module.children.push(item.ident.to_string()),
            Some((_, items)) => items.iter().for_each(|item| self.visit_item(item)),
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        self.module.import(Vec::new(), &item.tree);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.module.mention(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {}

    fn visit_macro(&mut self, mac: &'ast syn::Macro) {
        self.module.tokens(mac.tokens.clone());
    }
}

/// Modules and their uses of each other.
pub struct Graph {
    roots: Vec<String>,
    edges: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    pub fn of(sources: &Sources) -> Graph {
        let mut modules: BTreeMap<ModulePath, Module> = BTreeMap::new();
        let mut unread = vec![ModulePath::new()];
        while let Some(path) = unread.pop() {
            let text = sources.of_module(&path).unwrap_or_else(|| panic!("no file of module {path:?}"));
            let file = syn::parse_file(text).unwrap_or_else(|error| panic!("{path:?}: {error}"));
            let mut module = Module::default();
            Reader { module: &mut module }.visit_file(&file);
            unread.extend(
                module.children.iter().map(|child| [&path[..], std::slice::from_ref(child)].concat()),
            );
            modules.insert(path, module);
        }
        let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (path, module) in &modules {
            let mut used = BTreeSet::new();
            let written = module.imports.values().chain(&module.globs).chain(&module.mentions);
            written.for_each(|written| follow(&modules, path, written, &mut used, 0));
            // What a glob brings may be any name that is mentioned.
            for glob in &module.globs {
                for mention in &module.mentions {
                    follow(&modules, path, &[&glob[..], mention].concat(), &mut used, 0);
                }
            }
            let used = used.into_iter().filter(|used| !is_kin(path, used)).map(|used| used.join("::"));
            edges.insert(path.join("::"), used.collect());
        }
        let roots = modules[&ModulePath::new()].children.clone();
        Graph { roots, edges }
    }

    /// The library's own list of modules, in its order.
    pub fn roots(&self) -> &[String] {
        &self.roots
    }

    pub fn edges(&self) -> impl Iterator<Item = (&str, &str)> {
        self.edges.iter().flat_map(|(from, used)| used.iter().map(move |to| (from.as_str(), to.as_str())))
    }

    /// Sets of modules that use each other, directly or by way of others of the set.
    pub fn circles(&self) -> Vec<Vec<String>> {
        let reach: BTreeMap<&String, BTreeSet<&String>> =
            self.edges.keys().map(|from| (from, self.reachable(from))).collect();
        let mut circles = BTreeSet::new();
        for (from, reached) in &reach {
            if reached.contains(from) {
                let members =
                    reached.iter().filter(|to| reach.get(**to).is_some_and(|back| back.contains(from)));
                circles.insert(members.map(|member| (*member).clone()).collect::<Vec<_>>());
            }
        }
        circles.into_iter().collect()
    }

    fn reachable<'g>(&'g self, from: &String) -> BTreeSet<&'g String> {
        let mut reached = BTreeSet::new();
        let mut unseen: Vec<&String> = self.edges.get(from).into_iter().flatten().collect();
        while let Some(module) = unseen.pop() {
            if reached.insert(module) {
                unseen.extend(self.edges.get(module).into_iter().flatten());
            }
        }
        reached
    }
}

/// Ancestor and descendant.
fn is_kin(one: &[String], other: &[String]) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

/// Re-exports of re-exports.
const DEPTH_MAX: usize = 8;

/// Adds the modules that a path leads through: the one in which its name is looked up, and those that re-export it.
fn follow(
    modules: &BTreeMap<ModulePath, Module>,
    at: &ModulePath,
    written: &[String],
    used: &mut BTreeSet<ModulePath>,
    depth: usize,
) {
    let Some((first, mut rest)) = written.split_first() else { return };
    if depth > DEPTH_MAX {
        return;
    }
    let mut module = at.clone();
    match first.as_str() {
        "crate" => module.clear(),
        "self" => {}
        "super" => drop(module.pop()),
        name if modules[at].children.iter().any(|child| child == name) => module.push(name.to_owned()),
        name => {
            // An imported name, maybe of a module.
            if let Some(import) = modules[at].imports.get(name).filter(|import| import.first() != Some(first))
            {
                follow(modules, at, &[&import[..], rest].concat(), used, depth + 1);
            }
            return;
        }
    }
    while let Some((name, further)) = rest.split_first() {
        let child = [&module[..], std::slice::from_ref(name)].concat();
        if name == "super" {
            module.pop();
        } else if modules.contains_key(&child) {
            module = child;
        } else {
            break;
        }
        rest = further;
    }
    used.insert(module.clone());
    let Some(name) = rest.first() else { return };
    let Some(owner) = modules.get(&module).filter(|_| module != *at) else { return };
    if let Some(import) = owner.imports.get(name) {
        follow(modules, &module, &[&import[..], &rest[1..]].concat(), used, depth + 1);
    } else {
        for glob in &owner.globs {
            follow(modules, &module, &[&glob[..], rest].concat(), used, depth + 1);
        }
    }
}
