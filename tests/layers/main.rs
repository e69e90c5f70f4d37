//! The layers of `src`: no circle of modules, and each module uses only those that `lib.rs` lists above it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod graph;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use graph::{Graph, Sources};

/// Top-level modules that may use nothing of each other.
const STRANGERS: [(&str, &str); 1] = [("kafka", "postgres")];

fn tree() -> Graph {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    Graph::of(&Sources::read(&src))
}

fn top(module: &str) -> &str {
    module.split("::").next().unwrap_or_default()
}

#[test]
fn no_module_uses_itself_through_others() {
    let circles = tree().circles();
    assert!(circles.is_empty(), "circles of modules: {circles:#?}");
}

#[test]
fn a_module_uses_only_those_that_the_library_lists_above_it() {
    let graph = tree();
    let place: BTreeMap<_, _> =
        graph.roots().iter().enumerate().map(|(at, name)| (name.clone(), at)).collect();
    assert!(place.len() > 10, "{place:?}");
    let upward: BTreeSet<_> = graph
        .edges()
        .filter(|(from, to)| top(from) != top(to) && place[top(from)] < place[top(to)])
        .collect();
    assert!(upward.is_empty(), "uses of a module that the library lists below: {upward:#?}");
}

#[test]
fn kafka_and_postgres_do_not_know_each_other() {
    let graph = tree();
    for (one, other) in STRANGERS {
        let met: Vec<_> = graph
            .edges()
            .filter(|(from, to)| [(one, other), (other, one)].contains(&(top(from), top(to))))
            .collect();
        assert!(met.is_empty(), "{met:#?}");
        assert!(
            graph.roots().iter().any(|root| root == one) && graph.roots().iter().any(|root| root == other)
        );
    }
}

fn circles(files: &[(&str, &str)]) -> Vec<Vec<String>> {
    Graph::of(&Sources::of(files)).circles()
}

#[test]
fn a_circle_is_found_however_it_is_written() {
    let lib = ("lib.rs", "mod a; mod b; mod c;");
    let plain = ("a.rs", "pub struct A;");
    let ways_back = [
        "use crate::a::A;",
        "use super::a::{self, A as Other};",
        "use super::a::*;",
        "fn f() -> crate::a::A { crate::a::A }",
        "fn f() { println!(\"{:?}\", crate::a::A); }",
        "use crate::{a as other}; fn f(_: other::A) {}",
        // By another module's re-export.
        "use crate::c::Again;",
        "use crate::c::*; fn f(_: Again) {}",
    ];
    for way in ways_back {
        let back = ("b.rs", way);
        let again = ("c.rs", "pub use crate::a::A as Again;");
        assert!(circles(&[lib, plain, back, again]).is_empty(), "{way}");
        let forth = ("a.rs", "use crate::b; pub struct A;");
        let found = circles(&[lib, forth, back, again]);
        assert!(found.iter().any(|circle| circle.iter().any(|m| m == "a")), "{way}: {found:?}");
    }
}

#[test]
fn parents_with_their_children_and_tests_make_no_circle() {
    let files = [
        ("lib.rs", "mod a; mod b;"),
        (
            "a.rs",
            "mod child; pub use child::C; #[cfg(test)] mod tests { use crate::b::B; } #[cfg(test)] use crate::b;",
        ),
        ("a/child.rs", "use super::Other; pub struct C;"),
        ("b.rs", "use crate::a::C; pub struct B;"),
    ];
    assert_eq!(circles(&files), Vec::<Vec<String>>::new());
}

#[test]
fn a_circle_of_two_children_of_different_parents_is_found() {
    let files = [
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", "pub mod x; pub mod y;"),
        ("a/x.rs", "use crate::b::z::Z;"),
        ("a/y.rs", "pub struct Y;"),
        ("b.rs", "pub mod z;"),
        ("b/z.rs", "use crate::a::x; pub struct Z;"),
    ];
    assert_eq!(circles(&files), [["a::x", "b::z"]]);
}
