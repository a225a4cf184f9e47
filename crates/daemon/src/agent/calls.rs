//! Requests to the agent with JSON answers, each with a deadline and a bound.

use std::time::Duration;

use banger_proto::agent::{Freeze, GuestStats, Health, MAX_JSON, MAX_PORTS, Personalize, Port, Renew, Shutdown, Stat};
use banger_proto::api::Session;
use banger_proto::error::ErrorBody;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use super::link::{Body, Link, LinkError};
use super::sanitize;

/// How long a call may take on an agent that is up.
pub const CALL: Duration = Duration::from_secs(20);
/// How long a connection may take to come back on a machine that runs.
pub const RECONNECT: Duration = Duration::from_secs(10);

/// A body without bytes.
pub fn empty() -> Body {
    Body::new(Empty::new().map_err(|never| match never {}))
}

/// A body of bytes that are there.
pub fn full(bytes: Vec<u8>) -> Body {
    Body::new(Full::new(Bytes::from(bytes)).map_err(|never| match never {}))
}

/// A request to the agent.
pub fn request(method: Method, path: &str, body: Body) -> Result<Request<Body>, LinkError> {
    let uri = format!("http://agent{path}");
    Request::builder()
        .method(method)
        .uri(&uri)
        .body(body)
        .map_err(|e| LinkError::Answer {
            what: path.to_owned(),
            why: format!("an impossible request: {e}"),
        })
}

/// Encodes a value for a query.
pub fn query_value(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, b| {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => out.push(char::from(b)),
            _ => out.push_str(&format!("%{b:02X}")),
        }
        out
    })
}

impl Link {
    /// Health, and proof that it is this machine's agent. Before it was personalised an agent has no machine yet.
    pub async fn health(&self, connect_by: Instant) -> Result<Health, LinkError> {
        let health: Health = self.call(Method::GET, "/v1/health", empty(), connect_by, CALL).await?;
        self.check(health)
    }

    fn check(&self, health: Health) -> Result<Health, LinkError> {
        if health.machine_id.is_empty() || health.machine_id == self.id().as_str() {
            return Ok(health);
        }
        let found = sanitize::text(&health.machine_id, 32);
        Err(LinkError::WrongMachine {
            wanted: self.id().to_string(),
            found,
        })
    }

    /// Makes the machine itself.
    pub async fn personalize(&self, personalize: &Personalize, within: Duration) -> Result<Health, LinkError> {
        let health = self.post("/v1/personalize", personalize, within).await?;
        self.check(health)
    }

    /// Lets nothing run in the guest but the agent. The answer says that this is so now.
    pub async fn freeze(&self, freeze: &Freeze, within: Duration) -> Result<Health, LinkError> {
        let health = self.post("/v1/freeze", freeze, within).await?;
        self.check(health)
    }

    /// Tells a frozen guest who it is and what time it is, and lets it go on. A guest that takes on an identity is this
    /// link's machine only with the answer.
    pub async fn renew(&self, renew: &Renew, within: Duration) -> Result<Health, LinkError> {
        let health = self.post("/v1/renew", renew, within).await?;
        self.check(health)
    }

    /// Health, once the image's init has finished its start-up.
    pub async fn system(&self, within: Duration) -> Result<Health, LinkError> {
        let by = Instant::now() + within.min(RECONNECT);
        let health = self.call(Method::GET, "/v1/system", empty(), by, within).await?;
        self.check(health)
    }

    /// Sessions, sanitised.
    pub async fn sessions(&self) -> Result<Vec<Session>, LinkError> {
        let list: Vec<Session> = self.get("/v1/sessions").await?;
        Ok(list.into_iter().map(sanitize::session).collect())
    }

    /// What stands at a path.
    pub async fn stat(&self, path: &str) -> Result<Stat, LinkError> {
        let mut stat: Stat = self.get(&format!("/v1/stat?path={}", query_value(path))).await?;
        stat.kind = sanitize::text(&stat.kind, 16);
        Ok(stat)
    }

    /// Figures from inside.
    pub async fn stats(&self, within: Duration) -> Result<GuestStats, LinkError> {
        self.call(Method::GET, "/v1/stats", empty(), Instant::now() + within, within)
            .await
    }

    /// What listens for TCP in the guest, sanitised.
    pub async fn ports(&self, within: Duration) -> Result<Vec<Port>, LinkError> {
        let ports: Vec<Port> = self
            .call(Method::GET, "/v1/ports", empty(), Instant::now() + within, within)
            .await?;
        Ok(ports.into_iter().take(MAX_PORTS).map(sanitize::port).collect())
    }

    /// Asks the guest to go down.
    pub async fn shutdown(&self, graceful: bool, within: Duration) -> Result<(), LinkError> {
        let body = full(json(&Shutdown { graceful })?);
        let answer = self
            .send(
                request(Method::POST, "/v1/shutdown", body)?,
                Instant::now() + within,
                Some(within),
            )
            .await?;
        refusal("shutdown", answer).await.map(|_| ())
    }

    /// Reads the JSON answer of a transfer whose head has come.
    pub async fn finish<T: DeserializeOwned>(&self, answer: Response<Incoming>, what: &str) -> Result<T, LinkError> {
        let answer = refusal(what, answer).await?;
        read(answer, what, CALL).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, LinkError> {
        self.call(Method::GET, path, empty(), Instant::now() + RECONNECT, CALL)
            .await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        value: &impl Serialize,
        within: Duration,
    ) -> Result<T, LinkError> {
        let body = full(json(value)?);
        self.call(Method::POST, path, body, Instant::now() + within, within)
            .await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Body,
        connect_by: Instant,
        within: Duration,
    ) -> Result<T, LinkError> {
        let answer = self
            .send(request(method, path, body)?, connect_by, Some(within))
            .await?;
        let answer = refusal(path, answer).await?;
        read(answer, path, within).await
    }
}

async fn read<T: DeserializeOwned>(answer: Response<Incoming>, path: &str, within: Duration) -> Result<T, LinkError> {
    let what = || path.split('?').next().unwrap_or(path).to_owned();
    let bytes = timeout(within, collect(answer.into_body()))
        .await
        .map_err(|_| LinkError::Timeout {
            what: format!("finish its answer to {}", what()),
            after: within,
        })?
        .map_err(|why| LinkError::Answer { what: what(), why })?;
    serde_json::from_slice(&bytes).map_err(|e| LinkError::Answer {
        what: what(),
        why: format!("JSON that does not fit: {e}"),
    })
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, LinkError> {
    serde_json::to_vec(value).map_err(|e| LinkError::Answer {
        what: "a request".to_owned(),
        why: e.to_string(),
    })
}

async fn collect(body: Incoming) -> Result<Bytes, String> {
    match Limited::new(body, MAX_JSON).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) if e.is::<LengthLimitError>() => Err(format!("more than {MAX_JSON} bytes")),
        Err(e) => Err(format!("a body that broke off: {e}")),
    }
}

/// Passes an answer that is a success on; makes an error of any other.
pub async fn refusal(what: &str, answer: Response<Incoming>) -> Result<Response<Incoming>, LinkError> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let bytes = timeout(CALL, collect(answer.into_body()))
        .await
        .unwrap_or_else(|_| Err(String::new()));
    match bytes.ok().and_then(|b| serde_json::from_slice::<ErrorBody>(&b).ok()) {
        Some(body) => Err(LinkError::Refused(sanitize::error(&body.error))),
        None => Err(LinkError::Answer {
            what: what.split('?').next().unwrap_or(what).to_owned(),
            why: format!("status {}", status.as_u16()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_encoded() {
        assert_eq!(query_value("/a b&c=ü?#%"), "/a%20b%26c%3D%C3%BC%3F%23%25");
    }
}
