//! A route: its method, path, right, handler and documentation, in one place.

use std::pin::Pin;

use bytes::Bytes;
use fieldline_model::Scope;
use http_body_util::Full;
use hyper::{Method, Response};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::{PartialSchema, ToSchema};

use crate::call::{Call, Ctx};
use crate::problem::Problem;

/// What a handler comes to.
pub(crate) type Answer = Result<Response<Full<Bytes>>, Problem>;

type Running = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// Does the work of a route.
#[derive(Clone, Copy)]
pub(crate) enum Handler {
    /// For anyone.
    Public(fn(Call) -> Running),
    /// For those who signed in; `None` needs no scope.
    Private(Option<Scope>, fn(Ctx) -> Running),
}

/// A query parameter.
#[derive(Clone, Copy)]
pub(crate) struct Param {
    pub(crate) name: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) about: &'static str,
}

/// A type's JSON schema.
#[derive(Clone, Copy)]
pub(crate) struct TypeDoc {
    pub(crate) name: fn() -> std::borrow::Cow<'static, str>,
    pub(crate) schema: fn() -> RefOr<Schema>,
    pub(crate) parts: fn(&mut Vec<(String, RefOr<Schema>)>),
}

/// The schema of `T`.
pub(crate) const fn of<T: ToSchema>() -> TypeDoc {
    TypeDoc {
        name: <T as ToSchema>::name,
        schema: <T as PartialSchema>::schema,
        parts: <T as ToSchema>::schemas,
    }
}

/// What a route answers with when all is well.
#[derive(Clone, Copy)]
pub(crate) enum Shape {
    /// Nothing.
    Empty,
    /// One object.
    One(TypeDoc),
    /// A page of a list.
    List(TypeDoc),
    /// A JSON object of free form.
    Object,
    /// Text.
    Text,
    /// The connection becomes a WebSocket.
    Upgrade,
}

/// A route.
#[derive(Clone, Copy)]
pub(crate) struct Route {
    pub(crate) method: &'static str,
    pub(crate) path: &'static str,
    pub(crate) handler: Handler,
    pub(crate) group: &'static str,
    pub(crate) title: &'static str,
    pub(crate) about: &'static str,
    pub(crate) query: &'static [Param],
    pub(crate) body: Option<TypeDoc>,
    pub(crate) body_bytes_max: usize,
    pub(crate) status: u16,
    pub(crate) shape: Shape,
    /// Whether the answer holds a secret.
    pub(crate) secret: bool,
    /// Whether it may wait for as long as the caller asks.
    pub(crate) waits: bool,
    /// Whether the object has a revision, so that `ETag` and `If-Match` apply.
    pub(crate) revision: bool,
}

/// Largest body, where a route does not say otherwise.
const BODY_BYTES_MAX: usize = 1 << 20;

const fn route(
    method: &'static str,
    path: &'static str,
    handler: Handler,
    group: &'static str,
    title: &'static str,
) -> Route {
    Route {
        method,
        path,
        handler,
        group,
        title,
        about: "",
        query: &[],
        body: None,
        body_bytes_max: BODY_BYTES_MAX,
        status: 200,
        shape: Shape::Empty,
        secret: false,
        waits: false,
        revision: false,
    }
}

macro_rules! methods {
    ($($name:ident = $method:literal, $status:literal;)+) => {$(
        pub(crate) const fn $name(
            path: &'static str,
            handler: Handler,
            group: &'static str,
            title: &'static str,
        ) -> Route {
            Route { status: $status, ..route($method, path, handler, group, title) }
        }
    )+};
}

methods! {
    get = "GET", 200;
    post = "POST", 201;
    put = "PUT", 200;
    patch = "PATCH", 200;
    delete = "DELETE", 204;
}

impl Route {
    pub(crate) const fn about(self, about: &'static str) -> Self {
        Self { about, ..self }
    }

    pub(crate) const fn query(self, query: &'static [Param]) -> Self {
        Self { query, ..self }
    }

    pub(crate) const fn takes<T: ToSchema>(self) -> Self {
        Self { body: Some(of::<T>()), ..self }
    }

    pub(crate) const fn body_max(self, body_bytes_max: usize) -> Self {
        Self { body_bytes_max, ..self }
    }

    pub(crate) const fn status(self, status: u16) -> Self {
        Self { status, ..self }
    }

    pub(crate) const fn gives<T: ToSchema>(self) -> Self {
        Self { shape: Shape::One(of::<T>()), ..self }
    }

    pub(crate) const fn lists<T: ToSchema>(self) -> Self {
        Self { shape: Shape::List(of::<T>()), ..self }
    }

    pub(crate) const fn shape(self, shape: Shape) -> Self {
        Self { shape, ..self }
    }

    pub(crate) const fn secret(self) -> Self {
        Self { secret: true, ..self }
    }

    pub(crate) const fn waits(self) -> Self {
        Self { waits: true, ..self }
    }

    pub(crate) const fn revision(self) -> Self {
        Self { revision: true, ..self }
    }

    pub(crate) fn is(&self, method: &Method) -> bool {
        // A HEAD is a GET whose body is not sent.
        self.method == method.as_str() || (method == Method::HEAD && self.method == "GET")
    }

    /// The scope that it needs.
    pub(crate) fn scope(&self) -> Option<Scope> {
        match self.handler {
            Handler::Private(scope, _) => scope,
            Handler::Public(_) => None,
        }
    }

    pub(crate) fn is_public(&self) -> bool {
        matches!(self.handler, Handler::Public(_))
    }
}
