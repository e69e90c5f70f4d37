//! Pages that are generated from the program. `make docs` updates them.

use std::fs;
use std::path::{Path, PathBuf};

const BEGIN: &str = "<!-- generated: `make docs` writes this part -->\n";
const END: &str = "<!-- end of the generated part -->\n";

pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Compares the generated part of a page with `text`, or replaces it if the environment has `UPDATE_DOCS=1`.
pub fn check(page: &str, text: &str) {
    let path: PathBuf = repository().join(page);
    let written = fs::read_to_string(&path).unwrap();
    let (head, rest) = written.split_once(BEGIN).unwrap_or_else(|| panic!("{page} lacks {BEGIN:?}"));
    let (part, tail) = rest.split_once(END).unwrap_or_else(|| panic!("{page} lacks {END:?}"));
    let text = format!("\n{}\n\n", text.trim());
    if std::env::var("UPDATE_DOCS").is_ok_and(|value| value == "1") {
        fs::write(&path, format!("{head}{BEGIN}{text}{END}{tail}")).unwrap();
        return;
    }
    let difference = part.lines().zip(text.lines()).find(|(is, should)| is != should);
    assert!(
        part == text,
        "{page} is not what the program says: `make docs`. First difference: {difference:?}"
    );
}
