//! A strict parser for one JSON object: RFC 8259 in UTF-8, with the contract's additional rules (no repeated
//! names, no lone surrogates, at most 32 levels), which also apply to ignored values.
//!
//! Existing parsers are too lenient: they skip ignored values without checking names, surrogates or UTF-8,
//! convert numbers to floats, or use the last of repeated names. This parser reads every byte once, borrows
//! where possible, and returns numbers as text. The worst case is O(n log n), because of the check for
//! repeated names.

use std::borrow::Cow;

use super::refusal::{Reason, Refusal};

/// Levels that values may nest; the outermost object is level 1.
pub(super) const DEPTH_MAX: u32 = 32;

/// The value of a field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Value<'a> {
    /// A number's text, or the text between a string's quotes; otherwise empty.
    raw: &'a str,
    kind: Kind,
}

/// As wide as a machine word, so that a [`Value`] is copied in whole words: other copies cause
/// store-forwarding stalls.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
enum Kind {
    Null,
    Number,
    String,
    /// A string with valid escapes.
    EscapedString,
    /// A boolean, array or object, which no field accepts.
    Other,
}

impl<'a> Value<'a> {
    pub(super) fn is_null(&self) -> bool {
        self.kind == Kind::Null
    }

    /// The text of a number in JSON's grammar.
    pub(super) fn number(&self) -> Option<&'a str> {
        (self.kind == Kind::Number).then_some(self.raw)
    }

    /// A string; allocates only for escapes.
    #[inline]
    pub(super) fn string(&self) -> Option<Cow<'a, str>> {
        match self.kind {
            Kind::String => Some(Cow::Borrowed(self.raw)),
            Kind::EscapedString => Some(Cow::Owned(unescape(self.raw))),
            Kind::Null | Kind::Number | Kind::Other => None,
        }
    }

    fn of(kind: Kind) -> Self {
        Value { raw: "", kind }
    }
}

/// An error in the text and its byte position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Fault {
    pub(super) kind: FaultKind,
    pub(super) at: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr)]
pub(super) enum FaultKind {
    #[strum(serialize = "is not UTF-8")]
    NotUtf8,
    #[strum(serialize = "is not a JSON object")]
    NotAnObject,
    #[strum(serialize = "begins with a byte order mark, which JSON does not allow")]
    ByteOrderMark,
    #[strum(serialize = "ends too early")]
    Ended,
    #[strum(serialize = "has a character that JSON does not allow there")]
    Unexpected,
    #[strum(serialize = "goes on after its object")]
    Trailing,
    #[strum(serialize = "has an unescaped control character in a string")]
    ControlCharacter,
    #[strum(serialize = "has an escape that JSON does not know")]
    Escape,
    #[strum(serialize = "has a lone surrogate")]
    Surrogate,
    #[strum(serialize = "has a number that is not of JSON's grammar")]
    Number,
    #[strum(serialize = "nests deeper than 32 levels")]
    TooDeep,
    #[strum(serialize = "has a name twice in one object")]
    RepeatedName,
}

impl Fault {
    /// The refusal with the rule and the position, without any part of the text.
    pub(super) fn refusal(self) -> Refusal {
        let rule: &str = self.kind.into();
        Refusal::new(Reason::MalformedJson, format!("value: {rule} (byte {})", self.at))
    }
}

/// Parses a text that is one object. Returns the values of the fields for which `slot` returns an index.
///
/// # Errors
/// The first error in the text, except that repeated names are checked at the end of their object.
pub(super) fn object<const N: usize>(
    bytes: &[u8],
    slot: impl Fn(&str) -> Option<usize>,
) -> Result<[Option<Value<'_>>; N], Fault> {
    // Of UTF-8, and of UTF-16 in both orders.
    let marks = [&b"\xEF\xBB\xBF"[..], b"\xFE\xFF", b"\xFF\xFE"];
    let or_marked =
        |kind| if marks.iter().any(|mark| bytes.starts_with(mark)) { FaultKind::ByteOrderMark } else { kind };
    let text = std::str::from_utf8(bytes)
        .map_err(|error| Fault { kind: or_marked(FaultKind::NotUtf8), at: error.valid_up_to() })?;
    let mut scanner = Scanner { text, bytes, at: 0, names: Vec::new() };
    let mut fields = [None; N];
    scanner.skip_whitespace();
    if scanner.peek() != Some(b'{') {
        return Err(scanner.fault(or_marked(FaultKind::NotAnObject)));
    }
    scanner.members(1, |name, value| match slot(name).and_then(|index| fields.get_mut(index)) {
        Some(field) if field.is_some() => Taken::Again,
        Some(field) => {
            *field = Some(value);
            Taken::Yes
        }
        None => Taken::No,
    })?;
    scanner.skip_whitespace();
    match scanner.peek() {
        None => Ok(fields),
        Some(_) => Err(scanner.fault(FaultKind::Trailing)),
    }
}

/// Whether a member of an object was stored.
enum Taken {
    Yes,
    No,
    /// The name is repeated.
    Again,
}

struct Scanner<'a> {
    /// The same bytes twice: as text to borrow from, and as bytes to scan.
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
    /// Member names of the open objects, outermost first, without those of stored members.
    names: Vec<Cow<'a, str>>,
}

impl<'a> Scanner<'a> {
    fn fault(&self, kind: FaultKind) -> Fault {
        Fault { kind, at: self.at }
    }

    /// The error for the next character, or for the end of the text.
    fn unexpected(&self) -> Fault {
        self.fault(if self.peek().is_some() { FaultKind::Unexpected } else { FaultKind::Ended })
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    #[inline]
    fn advance(&mut self, count: usize) {
        self.at = self.at.saturating_add(count);
    }

    /// Skips `c` if it is the next character.
    #[inline]
    fn eat(&mut self, c: u8) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.advance(1);
        }
        found
    }

    #[inline]
    fn skip_whitespace(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.advance(1);
        }
    }

    /// The text from `start` to the current position. Both are at ASCII characters, so at character
    /// boundaries.
    #[inline]
    fn since(&self, start: usize) -> &'a str {
        self.text.get(start..self.at).unwrap_or_default()
    }

    /// Parses the members of the object that begins here, at `level`.
    #[inline(always)]
    fn members(&mut self, level: u32, mut take: impl FnMut(&str, Value<'a>) -> Taken) -> Result<(), Fault> {
        if level > DEPTH_MAX {
            return Err(self.fault(FaultKind::TooDeep));
        }
        self.advance(1);
        let names_start = self.names.len();
        self.skip_whitespace();
        if self.eat(b'}') {
            return Ok(());
        }
        loop {
            let name_at = self.at;
            if self.peek() != Some(b'"') {
                return Err(self.unexpected());
            }
            let name = self.string()?.string().unwrap_or_default();
            self.skip_whitespace();
            if !self.eat(b':') {
                return Err(self.unexpected());
            }
            self.skip_whitespace();
            let value = self.value(level)?;
            match take(&name, value) {
                Taken::Yes => {}
                Taken::No => self.names.push(name),
                Taken::Again => return Err(Fault { kind: FaultKind::RepeatedName, at: name_at }),
            }
            self.skip_whitespace();
            if self.eat(b',') {
                self.skip_whitespace();
            } else if self.eat(b'}') {
                return self.close(names_start);
            } else {
                return Err(self.unexpected());
            }
        }
    }

    /// Checks the names of the object that ends here for repetitions, and removes them.
    fn close(&mut self, names_start: usize) -> Result<(), Fault> {
        let at = self.at.saturating_sub(1);
        if let Some(names) = self.names.get_mut(names_start..)
            && names.len() > 1
        {
            names.sort_unstable();
            if names.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
                return Err(Fault { kind: FaultKind::RepeatedName, at });
            }
        }
        self.names.truncate(names_start);
        Ok(())
    }

    #[inline(never)]
    fn ignored_object(&mut self, level: u32) -> Result<(), Fault> {
        self.members(level, |_, _| Taken::No)
    }

    #[inline(never)]
    fn elements(&mut self, level: u32) -> Result<(), Fault> {
        if level > DEPTH_MAX {
            return Err(self.fault(FaultKind::TooDeep));
        }
        self.advance(1);
        self.skip_whitespace();
        if self.eat(b']') {
            return Ok(());
        }
        loop {
            self.value(level)?;
            self.skip_whitespace();
            if self.eat(b',') {
                self.skip_whitespace();
            } else if self.eat(b']') {
                return Ok(());
            } else {
                return Err(self.unexpected());
            }
        }
    }

    /// Parses the value that begins here, inside an array or object of `level`. Inlined, so that the result
    /// stays in registers: copying it through memory took a third of the time.
    #[inline(always)]
    fn value(&mut self, level: u32) -> Result<Value<'a>, Fault> {
        let inner = level.saturating_add(1);
        match self.peek() {
            Some(b'"') => self.string(),
            Some(b'-' | b'0'..=b'9') => self.number().map(|raw| Value { raw, kind: Kind::Number }),
            Some(b'{') => self.ignored_object(inner).map(|()| Value::of(Kind::Other)),
            Some(b'[') => self.elements(inner).map(|()| Value::of(Kind::Other)),
            Some(b'n') => self.literal(b"null").map(|()| Value::of(Kind::Null)),
            Some(b't') => self.literal(b"true").map(|()| Value::of(Kind::Other)),
            Some(b'f') => self.literal(b"false").map(|()| Value::of(Kind::Other)),
            _ => Err(self.unexpected()),
        }
    }

    fn literal(&mut self, word: &[u8]) -> Result<(), Fault> {
        for &c in word {
            if !self.eat(c) {
                return Err(self.unexpected());
            }
        }
        Ok(())
    }

    fn number(&mut self) -> Result<&'a str, Fault> {
        let start = self.at;
        self.eat(b'-');
        if !self.eat(b'0') {
            self.digits()?;
        } else if let Some(b'0'..=b'9') = self.peek() {
            return Err(self.fault(FaultKind::Number));
        }
        if self.eat(b'.') {
            self.digits()?;
        }
        if self.eat(b'e') || self.eat(b'E') {
            let _ = self.eat(b'+') || self.eat(b'-');
            self.digits()?;
        }
        Ok(self.since(start))
    }

    /// Skips one or more digits.
    fn digits(&mut self) -> Result<(), Fault> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.advance(1);
        }
        if self.at == start {
            let kind = if self.peek().is_some() { FaultKind::Number } else { FaultKind::Ended };
            return Err(self.fault(kind));
        }
        Ok(())
    }

    /// Parses the string whose opening quote is here.
    #[inline(always)]
    fn string(&mut self) -> Result<Value<'a>, Fault> {
        self.advance(1);
        let start = self.at;
        let mut kind = Kind::String;
        loop {
            self.skip_plain();
            match self.peek() {
                Some(b'"') => {
                    let raw = self.since(start);
                    self.advance(1);
                    return Ok(Value { raw, kind });
                }
                Some(b'\\') => {
                    kind = Kind::EscapedString;
                    self.escape()?;
                }
                Some(_) => return Err(self.fault(FaultKind::ControlCharacter)),
                None => return Err(self.fault(FaultKind::Ended)),
            }
        }
    }

    /// Skips characters of a string that need no handling: all but quotes, backslashes and control
    /// characters. Eight bytes at a time where possible ("Determine if a word has a byte less than n", Bit
    /// Twiddling Hacks).
    #[inline]
    fn skip_plain(&mut self) {
        const ONES: u64 = 0x0101_0101_0101_0101;
        const HIGHS: u64 = 0x8080_8080_8080_8080;
        const fn has_zero(word: u64) -> u64 {
            word.wrapping_sub(ONES) & !word & HIGHS
        }
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let (words, _) = rest.as_chunks::<8>();
        for chunk in words {
            let word = u64::from_le_bytes(*chunk);
            let control = word.wrapping_sub(ONES * 0x20) & !word & HIGHS;
            let special =
                control | has_zero(word ^ (ONES * b'"' as u64)) | has_zero(word ^ (ONES * b'\\' as u64));
            if special != 0 {
                // A borrow can only flag bytes above a correctly flagged byte, so the lowest flag is correct.
                self.advance((special.trailing_zeros() / 8) as usize);
                return;
            }
            self.advance(8);
        }
        while let Some(c) = self.peek() {
            if c < 0x20 || c == b'"' || c == b'\\' {
                return;
            }
            self.advance(1);
        }
    }

    /// Checks the escape whose backslash is here.
    fn escape(&mut self) -> Result<(), Fault> {
        let start = self.at;
        self.advance(1);
        match self.peek() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.advance(1);
                return Ok(());
            }
            Some(b'u') => {}
            Some(_) => return Err(self.fault(FaultKind::Escape)),
            None => return Err(self.fault(FaultKind::Ended)),
        }
        let lone = Fault { kind: FaultKind::Surrogate, at: start };
        match self.code_unit()? {
            0xDC00..=0xDFFF => Err(lone),
            0xD800..=0xDBFF => {
                if !self.eat(b'\\') || self.peek() != Some(b'u') {
                    return Err(lone);
                }
                match self.code_unit()? {
                    0xDC00..=0xDFFF => Ok(()),
                    _ => Err(lone),
                }
            }
            _ => Ok(()),
        }
    }

    /// Parses the four digits after the `u` that is here.
    fn code_unit(&mut self) -> Result<u16, Fault> {
        self.advance(1);
        let digits = self.bytes.get(self.at..self.at.saturating_add(4));
        let Some(unit) = digits.and_then(hex) else {
            return Err(self.fault(FaultKind::Escape));
        };
        self.advance(4);
        Ok(unit)
    }
}

/// The value of the first four characters as hexadecimal digits.
fn hex(text: &[u8]) -> Option<u16> {
    let mut sum = 0u32;
    for &c in text.get(..4)? {
        sum = sum * 16 + char::from(c).to_digit(16)?;
    }
    u16::try_from(sum).ok()
}

/// Decodes a string with valid escapes.
fn unescape(raw: &str) -> String {
    let mut out = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((plain, escape)) = rest.split_once('\\') {
        out.push_str(plain);
        let mut chars = escape.chars();
        match chars.next() {
            Some('b') => out.push('\u{8}'),
            Some('f') => out.push('\u{c}'),
            Some('n') => out.push('\n'),
            Some('r') => out.push('\r'),
            Some('t') => out.push('\t'),
            Some('u') => {
                let (c, len) = unescape_unit(escape.as_bytes());
                out.push(c);
                rest = escape.get(len..).unwrap_or_default();
                continue;
            }
            Some(c) => out.push(c),
            None => {}
        }
        rest = chars.as_str();
    }
    out.push_str(rest);
    out
}

/// Decodes `uXXXX` or `uXXXX\uXXXX` at the start; returns the character and the length of the escape.
fn unescape_unit(escape: &[u8]) -> (char, usize) {
    let unit = |at: usize| escape.get(at..).and_then(hex).map_or(0, u32::from);
    let high = unit(1);
    if let 0xD800..=0xDBFF = high {
        let low = unit(7);
        let code = 0x1_0000 + ((high & 0x3FF) << 10) + (low & 0x3FF);
        (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 11)
    } else {
        (char::from_u32(high).unwrap_or(char::REPLACEMENT_CHARACTER), 5)
    }
}

#[cfg(test)]
mod tests;
