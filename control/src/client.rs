//! One question and its answer, as every client asks it.

use std::io;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

use crate::protocol::Request;

/// Longest answer that is read, in bytes: a status with some ten thousand layers.
const ANSWER_LEN_MAX: u64 = 64 << 20;

/// A request as it is sent: one line.
pub fn request_line(request: &Request) -> Vec<u8> {
    let mut line = serde_json::to_vec(request).expect("a request has text keys only");
    line.push(b'\n');
    line
}

/// Sends a line and reads the line that answers it, which ends as lines do; how long that may take is the caller's.
///
/// # Errors
///
/// When the connection breaks, or ends before the answer does.
pub async fn exchange(connection: &mut (impl AsyncRead + AsyncWrite + Unpin), line: &[u8]) -> io::Result<Vec<u8>> {
    connection.write_all(line).await?;
    let mut answer = Vec::new();
    BufReader::new(connection).take(ANSWER_LEN_MAX).read_until(b'\n', &mut answer).await?;
    if answer.ends_with(b"\n") { Ok(answer) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
