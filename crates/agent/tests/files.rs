//! Files, connections and figures as the host sees them.

mod common;

use banger_agent::agent::Agent;
use banger_proto::agent::{GuestStats, Health, Stat};
use banger_proto::api::FilesWritten;
use banger_proto::error::{ErrorBody, ErrorCode};
use common::{channel, full, link, read};
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn a_tree_goes_out_and_in_again() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("a tree");
    std::fs::create_dir_all(from.join("sub")).unwrap();
    std::fs::write(from.join("sub/big"), vec![3; 3 << 20]).unwrap();
    std::fs::write(from.join("small"), "text").unwrap();
    let path = from.display().to_string().replace(' ', "%20");
    let (status, tar) = link.get(&format!("/v1/files?path={path}")).await;
    assert_eq!(status, 200);
    let to = dir.path().join("new/place");
    let (status, body) = read(
        link.call("PUT", &format!("/v1/files?path={}", to.display()), full(tar))
            .await,
    )
    .await;
    assert_eq!(status, 200, "{body:?}");
    assert_eq!(
        serde_json::from_slice::<FilesWritten>(&body).unwrap(),
        FilesWritten {
            entries: 4,
            bytes: (3 << 20) + 4
        }
    );
    assert_eq!(std::fs::read(to.join("a tree/sub/big")).unwrap(), vec![3; 3 << 20]);

    let (_, stat) = link.get(&format!("/v1/stat?path={path}/small")).await;
    assert_eq!(
        serde_json::from_slice::<Stat>(&stat).unwrap(),
        Stat {
            kind: "file".into(),
            size: 4,
            target: None
        }
    );
    let (_, stat) = link.get(&format!("/v1/stat?path={path}/none")).await;
    assert_eq!(serde_json::from_slice::<Stat>(&stat).unwrap().kind, "missing");
}

#[tokio::test]
async fn what_cannot_be_is_said_by_name() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let (status, body) = link.get("/v1/files?path=/no/such/file").await;
    let error = serde_json::from_slice::<ErrorBody>(&body).unwrap().error;
    assert_eq!((status, error.code), (404, ErrorCode::NotFound));
    assert!(error.message.contains("/no/such/file"));
    let dir = tempfile::tempdir().unwrap();
    let path = format!("/v1/files?path={}", dir.path().display());
    let (status, body) = read(link.call("PUT", &path, full(vec![b'x'; 4096])).await).await;
    assert_eq!(status, 400, "{body:?}");
    std::fs::write(dir.path().join("file"), "").unwrap();
    let (status, _) = read(link.call("PUT", &format!("{path}/file"), full("")).await).await;
    assert_eq!(status, 500);
    assert_eq!(link.get("/v1/files").await.0, 400);
}

#[tokio::test]
async fn a_broken_off_stream_is_no_success() {
    let agent = Agent::for_tests();
    let dir = tempfile::tempdir().unwrap();
    let path = format!("/v1/files?path={}", dir.path().join("t").display());
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(1 << 20);
    header.set_mode(0o644);
    builder
        .append_data(&mut header, "big", std::io::repeat(1).take(1 << 20))
        .unwrap();
    use std::io::Read;
    let whole = builder.into_inner().unwrap();
    let mut link = link(&agent).await;
    let (status, _) = read(link.call("PUT", &path, full(whole[..100_000].to_vec())).await).await;
    assert_ne!(status, 200);
    let (status, _) = read(link.call("PUT", &path, full(whole)).await).await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_port_of_the_guest() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        all.reverse();
        stream.write_all(&all).await.unwrap();
    });
    let (send, body) = channel();
    let response = link.call("POST", &format!("/v1/connect?target=tcp:{port}"), body).await;
    assert_eq!(response.status(), 200);
    send.send("abc".into()).await.unwrap();
    drop(send);
    let back = tokio::time::timeout(common::LIMIT, response.into_body().collect())
        .await
        .unwrap()
        .unwrap()
        .to_bytes();
    assert_eq!(back, "cba");
    let (status, _) = read(
        link.call("POST", &format!("/v1/connect?target=tcp:{port}"), full(""))
            .await,
    )
    .await;
    assert_eq!(status, 404, "nobody listens any more");
    assert_eq!(
        read(link.call("POST", "/v1/connect?target=x", full("")).await).await.0,
        400
    );
}

#[tokio::test]
async fn health_and_figures() {
    let agent = Agent::for_tests();
    let mut link = link(&agent).await;
    let health: Health = serde_json::from_slice(&link.get("/v1/health").await.1).unwrap();
    assert_eq!((health.system.as_str(), health.boot_id.len()), ("none", 36));
    assert!(health.uptime_ms > 0 && !health.kernel.is_empty());
    assert_eq!(
        link.get("/v1/system").await.0,
        200,
        "without an init it is settled at once"
    );
    let stats: GuestStats = serde_json::from_slice(&link.get("/v1/stats").await.1).unwrap();
    assert!(stats.memory_total_bytes > stats.memory_used_bytes);
    // Outside a guest nothing of the system is touched.
    let (status, _) = read(link.call("POST", "/v1/shutdown", full(r#"{"graceful":false}"#)).await).await;
    assert_eq!(status, 501);
    assert_eq!(
        read(link.call("POST", "/v1/personalize", full("{}")).await).await.0,
        400
    );
}
