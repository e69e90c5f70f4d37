//! The console's answers, without a browser, and its page in one.

mod browser;
mod chromium;
mod peers;
mod readers;

use std::net::SocketAddr;

use serde_json::Value;

use crate::support::{Daemon, Payment, Scope, ask, free_address, uuid_v4, wait_until};

fn state(daemon: &Daemon) -> Value {
    serde_json::from_str(&daemon.get("/console/state").unwrap().body).unwrap()
}

fn condition<'s>(state: &'s Value, alert: &str) -> &'s Value {
    state["conditions"].as_array().unwrap().iter().find(|c| c["alert"] == alert).unwrap()
}

#[test]
fn the_console_says_what_flows_what_was_refused_and_what_the_database_holds() {
    // GIVEN a daemon that wrote payments, and dead-lettered a record
    let scope = Scope::ready("console", 3, 2);
    let daemon = scope.daemon(&["run"]);
    daemon.wait_until_ready();
    // What must not be shown: of a payment that is written, and of one that is refused.
    let payment = |seed: u64| {
        let comment = r#","comment":"a-remark""#;
        Payment::new(uuid_v4(seed), 70_123_400 + seed as i64).amount("8462.57").more(comment).message()
    };
    let bad = payment(99).header("schema-version", "2");
    scope.produce(&scope.input_topic, (0..20).map(payment).chain([bad]));
    wait_until("all have their outcome", || daemon.metric("payment_writer_records_total", "") == 21.0);

    // WHEN its page is open for a while
    wait_until("the database has answered", || state(&daemon)["database"]["read_ms"].is_i64());
    wait_until("the rates are known", || state(&daemon)["outcomes"][0]["per_second"].as_f64() > Some(0.0));
    let shown = state(&daemon);

    // THEN its state has what happened
    assert_eq!((&shown["version"].is_string(), &shown["missing"]), (&true, &Value::Array(Vec::new())));
    let text = shown["summary"]["text"].as_str().unwrap();
    assert!(
        text.contains(
            "1 dead letter in the last minute (5 % of the records), all unsupported_schema_version"
        ),
        "{text}"
    );
    assert_eq!(shown["outcomes"][0]["total"], 20);
    let letters = shown["dead_letters"]["last"].as_array().unwrap();
    let by_reason = &shown["dead_letters"]["by_reason"];
    assert_eq!((letters.len(), &by_reason[0]["count"]), (1, &1.into()), "{by_reason}");
    let refused = scope.read_all(&scope.input_topic).into_iter().find(|record| {
        record
            .headers
            .iter()
            .any(|(name, value)| name == "schema-version" && value.as_deref() == Some(&b"2"[..]))
    });
    let refused = refused.unwrap();
    assert_eq!(letters[0]["partition"], refused.partition);
    assert_eq!(letters[0]["offset"], refused.offset);
    let condition = condition(&shown, "PaymentWriterDeadLetters");
    assert_eq!((&condition["holds"], condition["since_ms"].is_i64()), (&true.into(), true), "{condition}");
    let numbers: Vec<&Value> =
        shown["partitions"].as_array().unwrap().iter().map(|p| &p["partition"]).collect();
    assert_eq!(numbers, [0, 1, 2]);
    for row in shown["partitions"].as_array().unwrap() {
        assert_eq!((&row["state"], &row["lag_records"]), (&"live".into(), &0.into()), "{row}");
        assert!(row["since_ms"].is_i64() && row["lane"].is_u64(), "{row}");
    }
    for lane in shown["lanes"].as_array().unwrap() {
        assert!(lane["doing"].is_string() && lane["database"].is_null(), "{lane}");
    }
    // AND what the database holds
    let database = &shown["database"];
    assert!(database["error"].is_null(), "{database}");
    let generations = database["generations"].as_array().unwrap();
    assert!(generations.iter().any(|g| g["is_current"] == true && g["began_ms"].is_i64()), "{database}");
    let months = database["months"].as_array().unwrap();
    assert!(months.len() >= 4 && months.iter().all(|month| month["bytes"].is_i64()), "{database}");
    assert!(database["housekeeping"]["next_pass_ms"].is_i64(), "{database}");

    // AND the page has the sentence and the partitions without JavaScript, and may load its own files alone
    let page = daemon.get("/").unwrap();
    for expected in [
        "1 dead letter in the last minute",
        "<th scope=\"row\">2</th><td>live</td>",
        "Records are dead-lettered",
    ] {
        assert!(page.body.contains(expected), "{expected}: {}", page.body);
    }
    assert!(!page.body.contains("{{"), "{}", page.body);
    let policy = "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'";
    for path in ["/", "/console/main.js", "/console/runbooks"] {
        let head = daemon.get(path).unwrap().head;
        assert!(
            head.contains(policy) && head.contains("nosniff") && !head.contains("set-cookie"),
            "{path}: {head}"
        );
    }
    for path in ["/console/none", "/console/../Cargo.toml", "/console/"] {
        assert_eq!(daemon.get(path).unwrap().status, 404, "{path}");
    }
    assert!(daemon.get("/console/runbooks").unwrap().body.contains("id=\"paymentwriterdeadletters\""));
    // AND nothing of a payment
    for path in ["/", "/console/state", "/status", "/status/history", "/metrics", "/readyz"] {
        let text = daemon.get(path).unwrap().body;
        let secrets = ["701234", "8462.57", "a-remark"].map(str::to_owned);
        for secret in secrets.into_iter().chain([99, 3].map(|seed| uuid_v4(seed).to_string())) {
            assert!(!text.contains(&secret), "{path} has {secret}");
        }
    }
}

#[test]
fn a_page_shows_all_daemons_of_the_group_and_those_that_do_not_answer() {
    // GIVEN two daemons with a token that know both addresses and one where nothing listens
    let scope = Scope::ready("peers", 8, 2);
    let token_file = scope.servers.dir().join("peers-token");
    std::fs::write(&token_file, "token-of-all-daemons").unwrap();
    let addresses: [SocketAddr; 3] = std::array::from_fn(|_| free_address());
    let peers = serde_json::to_string(&addresses.map(|address| address.to_string())).unwrap();
    let start = |index: usize| {
        let instance = format!("peer-{index}");
        let settings = [
            ("PAYMENT_WRITER__CONSOLE__PEERS", peers.as_str()),
            ("PAYMENT_WRITER__KAFKA__INSTANCE_ID", &instance),
            ("PAYMENT_WRITER__ADMIN__TOKEN_FILE", token_file.to_str().unwrap()),
        ];
        scope.daemon_at(addresses[index], &["run"], &settings)
    };
    let (first, mut second) = (start(0), start(1));
    first.wait_until_ready();
    second.wait_until_ready();
    let shown = || -> Value {
        let bearer = "Authorization: Bearer token-of-all-daemons";
        let reply = ask(addresses[0], "GET", "/console/state", &["Host: 127.0.0.1", bearer], "").unwrap();
        serde_json::from_str(&reply.body).unwrap()
    };
    let row = |shown: &Value, index: usize| -> Option<Value> {
        let rows = shown["peers"].as_array().unwrap();
        rows.iter().find(|row| row["address"] == addresses[index].to_string()).cloned()
    };

    // THEN the page of one shows all partitions, the other daemon, and the address that does not answer
    wait_until("all partitions are shown", || {
        let shown = shown();
        let partitions = shown["partitions"].as_array().unwrap();
        let numbers: Vec<&Value> = partitions.iter().map(|row| &row["partition"]).collect();
        let others = partitions.iter().filter(|row| row["instance"] == "peer-1").count();
        let is_idle = row(&shown, 1).is_some_and(|row| row["summary"].as_str().unwrap().starts_with("Idle"));
        numbers == [0, 1, 2, 3, 4, 5, 6, 7] && others == 4 && is_idle
    });
    let before = shown();
    let other = row(&before, 1).unwrap();
    assert_eq!(
        (&other["instance"], &other["ready"], &other["partitions"]),
        (&"peer-1".into(), &true.into(), &4.into())
    );
    assert!(row(&before, 2).unwrap()["error"].as_str().unwrap().contains("onnection refused"), "{before}");
    assert!(row(&before, 0).is_none(), "it shows itself: {before}");
    assert!(!before.to_string().contains("token-of-all-daemons"), "{before}");

    // WHEN the other daemon is gone, its row says so
    second.kill();
    wait_until("it does not answer", || row(&shown(), 1).is_some_and(|row| row["error"].is_string()));
}
