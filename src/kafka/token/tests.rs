use super::*;

fn jwt(claims: &str) -> String {
    let part = |text: &str| {
        let text = openssl::base64::encode_block(text.as_bytes());
        text.replace('+', "-").replace('/', "_").trim_end_matches('=').to_owned()
    };
    format!("{}.{}.", part(r#"{"alg":"none"}"#), part(claims))
}

#[test]
fn a_web_token_says_itself_whose_it_is_and_how_long_it_is_valid() {
    for name in ["a", "ab", "abc", "writer/ÿ?"] {
        let token = jwt(&format!(r#"{{"sub":"{name}","iat":1.5,"exp":1790000000.5}}"#));
        let read = Token::read(&format!("{token}\n")).unwrap();
        assert_eq!(
            (read.text, read.principal, read.expires_at_ms),
            (token, name.to_owned(), 1_790_000_000_500)
        );
    }
}

#[test]
fn any_token_can_come_with_its_time() {
    let read = Token::read(r#"{"token": "abc", "expires_at_ms": 5, "principal": "me"}"#).unwrap();
    assert_eq!((read.text.as_str(), read.principal.as_str(), read.expires_at_ms), ("abc", "me", 5));
    assert_eq!(Token::read(r#"{"token": "abc", "expires_at_ms": 5}"#).unwrap().principal, "payment-writer");
}

#[test]
fn what_is_no_token_is_refused_without_showing_it() {
    let with_mark = format!("\u{feff}{}", jwt(r#"{"sub":"hush","exp":1790000000}"#));
    for output in [
        "",
        "hush",
        "a.b.c",
        "{}",
        r#"{"token": "hush"}"#,
        r#"{"token": "hushé", "expires_at_ms": 5}"#,
        r#"{"token": "hu\u0000sh", "expires_at_ms": 5}"#,
        r#"{"token": "", "expires_at_ms": 5}"#,
        r#"{"token": "hush", "expires_at_ms": 5, "principal": "a\nb"}"#,
        &jwt(r#"{"sub":"hush"}"#),
        "a.b.c.d",
        &with_mark,
    ] {
        let error = Token::read(output).unwrap_err();
        assert!(!error.contains("hush"), "{error}");
    }
    assert!(!format!("{:?}", Token::read(r#"{"token":"hush","expires_at_ms":5}"#).unwrap()).contains("hush"));
}

fn shell(script: &str) -> Vec<String> {
    ["sh", "-c", script].map(str::to_owned).to_vec()
}

#[test]
fn a_command_that_fails_is_told_without_its_output() {
    let expired = jwt(r#"{"sub":"hush","exp":1}"#);
    for (command, words) in [
        (shell("echo hush; echo hush >&2; exit 3"), "exit status: 3"),
        (shell("echo hush"), "neither"),
        (shell(&format!("echo {expired}")), "expired"),
        (vec!["/no/such/command".to_owned()], "cannot be started"),
        (Vec::new(), "empty"),
    ] {
        let error = run(&command).unwrap_err();
        assert!(error.contains(words) && !error.contains("hush"), "{error}");
    }
}

#[test]
fn whatever_a_command_leaves_behind_is_ended_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("process");
    let mut command = shell(r#"sleep 1000 & echo $! >"$0"; echo hush"#);
    command.push(file.to_str().unwrap().to_owned());
    assert!(run(&command).unwrap_err().contains("does not end"));
    let process = std::fs::read_to_string(file).unwrap();
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", process.trim())).unwrap_or_default();
    let began = Instant::now();
    // Gone, or a zombie that its new parent has not reaped yet.
    while !(state().is_empty() || state().contains(") Z ")) {
        assert!(began.elapsed() < Duration::from_secs(60), "it still runs");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_token_is_made_once_for_all_clients_and_anew_before_it_expires() {
    let folder = tempfile::tempdir().unwrap();
    let runs = folder.path().join("runs");
    let told = r#"{\"token\":\"$(wc -c <"$0")\",\"expires_at_ms\":$(($(date +%s) + 10))000}"#;
    let mut command = shell(&format!(r#"printf x >>"$0"; echo "{told}""#));
    command.push(runs.to_str().unwrap().to_owned());
    let property = property_of(&command);
    let first = generate(Some(&property)).unwrap();
    for _ in 0..20 {
        assert_eq!(generate(Some(&property)).unwrap().token, first.token);
    }
    let began = Instant::now();
    while generate(Some(&property)).map_or(true, |token| token.token == first.token) {
        assert!(began.elapsed() < Duration::from_secs(60), "no other token was made");
        std::thread::sleep(Duration::from_millis(20));
    }
}
