//! What the agent is asked with JSON answers, and transfers of files; each with a deadline and a bound.

use std::time::Duration;

use banger_proto::agent::{
    AdjustClock, Clock, Freeze, GuestStats, Health, MAX_JSON, MAX_PORTS, Personalize, Port, Renew, Shutdown, Stat,
    Target,
};
use banger_proto::api::{FilesWritten, Session};
use banger_proto::error::ErrorBody;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, LengthLimitError, Limited};
use hyper::Response;
use hyper::body::Incoming;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use super::call::Call;
use super::link::{Body, Link, LinkError};
use super::sanitize;
use super::transfer::{Download, Progress, watched};

/// A body without bytes.
pub fn empty() -> Body {
    Body::new(Empty::new().map_err(|never| match never {}))
}

/// A body of bytes that are there.
pub fn full(bytes: Vec<u8>) -> Body {
    Body::new(Full::new(Bytes::from(bytes)).map_err(|never| match never {}))
}

impl Link {
    /// Health, and proof that it is this machine's agent. Before it was personalised an agent has no machine yet.
    pub async fn health(&self, connect_by: Instant) -> Result<Health, LinkError> {
        let within = self.patience().answer;
        let health: Health = self.call(Call::Health, "", empty(), connect_by, within).await?;
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
        let health = self.post(Call::Personalize, personalize, within).await?;
        self.check(health)
    }

    /// Lets nothing run in the guest but the agent. The answer says that this is so now.
    pub async fn freeze(&self, freeze: &Freeze, within: Duration) -> Result<Health, LinkError> {
        let health = self.post(Call::Freeze, freeze, within).await?;
        self.check(health)
    }

    /// Tells a frozen guest who it is and what time it is, and lets it go on. A guest that takes on an identity is this
    /// link's machine only with the answer.
    pub async fn renew(&self, renew: &Renew, within: Duration) -> Result<Health, LinkError> {
        let health = self.post(Call::Renew, renew, within).await?;
        self.check(health)
    }

    /// Health, once the image's init has finished its start-up.
    pub async fn system(&self, within: Duration) -> Result<Health, LinkError> {
        let by = Instant::now() + within.min(self.patience().connect);
        let health = self.call(Call::System, "", empty(), by, within).await?;
        self.check(health)
    }

    /// Sessions, sanitised.
    pub async fn sessions(&self) -> Result<Vec<Session>, LinkError> {
        let list: Vec<Session> = self.get(Call::Sessions, "").await?;
        Ok(list.into_iter().map(sanitize::session).collect())
    }

    /// What stands at a path.
    pub async fn stat(&self, path: &str) -> Result<Stat, LinkError> {
        let mut stat: Stat = self.get(Call::Stat, path).await?;
        stat.kind = sanitize::text(&stat.kind, 16);
        // A path is used or dropped, never altered.
        let usable = |path: &str| path.starts_with('/') && path.len() < 4096 && !path.contains(char::is_control);
        stat.target = stat.target.take().filter(|t| usable(&t.path)).map(|t| Target {
            kind: sanitize::text(&t.kind, 16),
            path: t.path,
        });
        Ok(stat)
    }

    /// Figures from inside.
    pub async fn stats(&self, within: Duration) -> Result<GuestStats, LinkError> {
        self.call(Call::Stats, "", empty(), Instant::now() + within, within)
            .await
    }

    /// The guest's wall clock.
    pub async fn clock(&self, within: Duration) -> Result<Clock, LinkError> {
        self.call(Call::Clock, "", empty(), Instant::now() + within, within)
            .await
    }

    /// Changes the guest's wall clock.
    pub async fn adjust_clock(&self, by_ns: i64, within: Duration) -> Result<Clock, LinkError> {
        self.post(Call::AdjustClock, &AdjustClock { by_ns }, within).await
    }

    /// What listens for TCP in the guest, sanitised.
    pub async fn ports(&self) -> Result<Vec<Port>, LinkError> {
        let ports: Vec<Port> = self.get(Call::Ports, "").await?;
        Ok(ports.into_iter().take(MAX_PORTS).map(sanitize::port).collect())
    }

    /// Asks the guest to go down.
    pub async fn shutdown(&self, graceful: bool, within: Duration) -> Result<(), LinkError> {
        let body = full(json(&Shutdown { graceful })?);
        let answer = self
            .send(Call::Shutdown, "", body, Instant::now() + within, within)
            .await?;
        self.refusal(Call::Shutdown, answer).await.map(|_| ())
    }

    /// The tar stream of a path, which may be as long as it likes while bytes flow.
    pub async fn read_files(&self, path: &str) -> Result<Download, LinkError> {
        let call = Call::ReadFiles;
        let patience = self.patience();
        let answer = self
            .send(call, path, empty(), self.connect_by(), patience.answer)
            .await?;
        let body = self.refusal(call, answer).await?.into_body();
        Ok(Download::new(body, call.name(), patience.transfer))
    }

    /// Unpacks a tar stream below a path, which may be as long as it likes while the agent takes it. A client that is gone
    /// ends it.
    pub async fn write_files(&self, path: &str, body: Body) -> Result<FilesWritten, LinkError> {
        let call = Call::WriteFiles;
        let within = self.patience().transfer;
        let progress = Progress::new();
        let body = watched(body, &progress);
        let late = progress.stalled(within);
        let answer = self
            .send_until(call, path, body, self.connect_by(), within, late)
            .await?;
        let answer = self.refusal(call, answer).await?;
        read(answer, call, self.patience().answer).await
    }

    async fn get<T: DeserializeOwned>(&self, call: Call, argument: &str) -> Result<T, LinkError> {
        self.call(call, argument, empty(), self.connect_by(), self.patience().answer)
            .await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        call: Call,
        value: &impl Serialize,
        within: Duration,
    ) -> Result<T, LinkError> {
        let body = full(json(value)?);
        self.call(call, "", body, Instant::now() + within, within).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        call: Call,
        argument: &str,
        body: Body,
        connect_by: Instant,
        within: Duration,
    ) -> Result<T, LinkError> {
        let answer = self.send(call, argument, body, connect_by, within).await?;
        let answer = self.refusal(call, answer).await?;
        read(answer, call, within).await
    }

    /// Passes an answer that is a success on; makes an error of any other.
    pub(super) async fn refusal(
        &self,
        call: Call,
        answer: Response<Incoming>,
    ) -> Result<Response<Incoming>, LinkError> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let bytes = timeout(self.patience().answer, collect(answer.into_body()))
            .await
            .unwrap_or_else(|_| Err(String::new()));
        match bytes.ok().and_then(|b| serde_json::from_slice::<ErrorBody>(&b).ok()) {
            Some(body) => Err(LinkError::Refused(sanitize::error(&body.error))),
            None => Err(LinkError::Answer {
                what: call.name().to_owned(),
                why: format!("status {}", status.as_u16()),
            }),
        }
    }
}

async fn read<T: DeserializeOwned>(answer: Response<Incoming>, call: Call, within: Duration) -> Result<T, LinkError> {
    let what = || call.name().to_owned();
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
