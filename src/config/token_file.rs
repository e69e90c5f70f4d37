//! The file of `admin.token_file`.

use std::fs::File;
use std::io::Read;
use std::path::Path;

const TOKEN_BYTES_MAX: u64 = 4_096;
const TOKEN_CHARS_MIN: usize = 16;

/// Reads the token, which is at most 4 KiB; white space around it is ignored. It is read for each request, so that
/// it can be changed at any time.
///
/// # Errors
/// What is wrong with the file.
pub fn read_token(file: &Path) -> Result<String, String> {
    let failed = |reason: String| format!("admin.token_file {}: {reason}", file.display());
    let mut text = String::new();
    let opened = File::open(file).map_err(|error| failed(error.to_string()))?;
    opened.take(TOKEN_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
    let token = text.trim();
    let is_allowed = text.len() as u64 <= TOKEN_BYTES_MAX
        && token.len() >= TOKEN_CHARS_MIN
        && token.chars().all(|c| c.is_ascii_graphic());
    if is_allowed {
        Ok(token.to_owned())
    } else {
        Err(failed(format!(
            "must hold one line of at least {TOKEN_CHARS_MIN} visible ASCII characters, and at most {TOKEN_BYTES_MAX} \
             bytes"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_file_without_a_usable_token_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        for (text, is_usable) in [
            ("0123456789abcdef\n", true),
            ("0123456789abcde", false),
            ("0123456789 abcdef", false),
            ("", false),
            ("0123456789\nabcdef0123", false),
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(read_token(&file).is_ok(), is_usable, "{text:?}");
        }
        std::fs::write(&file, "a".repeat(5_000)).unwrap();
        assert!(read_token(&file).is_err());
        let missing = read_token(&folder.path().join("none")).unwrap_err();
        assert!(missing.contains("none") && missing.contains("No such file"), "{missing}");
    }
}
