//! What the documentation says of the tests.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder);
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn every_test_that_the_guarantees_name_exists() {
    let page = include_str!("../../docs/guarantees.md");
    let mut named = 0;
    for name in page.split('`').skip(1).step_by(2) {
        let Some((file, test)) = name.split_once("::") else { continue };
        if file == "file" {
            continue;
        }
        named += 1;
        let text = match file {
            "model" => fs::read_to_string(sources("model").iter().find(|p| p.ends_with("main.rs")).unwrap()),
            _ => {
                fs::read_to_string(sources("it").iter().find(|p| p.ends_with(format!("{file}.rs"))).unwrap())
            }
        };
        let has = |text: &str| test == "*" || text.contains(&format!("fn {test}()"));
        assert!(has(&text.unwrap()), "docs/guarantees.md names {name}, which is not there");
    }
    assert!(named > 30, "{named} tests are named");
}
