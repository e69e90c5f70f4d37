//! Runs the checks in `ops/` as an operator would.

use crate::site::{run, tools_are_here};

fn finds_nothing(check: &str) {
    tools_are_here();
    run(check, &[]).unwrap_or_else(|said| panic!("{said}"));
}

#[test]
fn alerts_their_tests_runbooks_and_routes_agree() {
    finds_nothing("ops/check");
}

#[test]
fn the_dashboard_matches_its_table_and_its_queries_parse() {
    finds_nothing("ops/grafana/check");
}

#[test]
fn the_compose_file_names_existing_files() {
    finds_nothing("ops/compose-check");
}
