//! What banger has left on the host.

use axum::Json;
use axum::extract::State;
use banger_proto::api::Audit;
use banger_proto::error::ErrorBody;

use super::App;
use crate::audit;
use crate::error::Failure;

/// Every host object that carries banger's mark, and what of it nobody owns.
#[utoipa::path(get, path = "/v1/audit", tag = "daemon",
    responses((status = 200, body = Audit), (status = "5XX", body = ErrorBody)))]
pub(super) async fn look(State(app): State<App>) -> Result<Json<Audit>, Failure> {
    app.reconciled().await?;
    Ok(Json(audit::look(&app).await))
}

/// The same, and what nobody owns is removed.
#[utoipa::path(post, path = "/v1/audit/fix", tag = "daemon",
    responses((status = 200, body = Audit), (status = "5XX", body = ErrorBody)))]
pub(super) async fn fix(State(app): State<App>) -> Result<Json<Audit>, Failure> {
    app.reconciled().await?;
    Ok(Json(audit::fix(&app).await))
}
