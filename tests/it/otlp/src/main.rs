//! Receives spans by OTLP over HTTP on 127.0.0.1, on the port of the first argument. Prints its port first;
//! then, for each line of input, all spans so far as one line of JSON. Ends when its input ends.

use std::io::BufRead;
use std::net::{IpAddr, Ipv4Addr};

use mock_collector::{MockServer, Protocol};
use serde_json::json;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let port = std::env::args().nth(1).unwrap_or_default().parse()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let server = MockServer::builder().protocol(Protocol::HttpBinary).host(IpAddr::V4(Ipv4Addr::LOCALHOST)).port(port);
    let server = runtime.block_on(server.start())?;
    println!("{}", server.addr().port());
    for line in std::io::stdin().lock().lines() {
        line?;
        let spans = runtime.block_on(server.with_collector(|collector| {
            let span = |s: &mock_collector::TestSpan| json!({ "resource": s.resource_attrs(), "span": s.span() });
            collector.spans().iter().map(span).collect::<Vec<_>>()
        }));
        println!("{}", serde_json::to_string(&spans)?);
    }
    Ok(())
}
