// Scores the column `text` of a parquet file into another parquet file, which has a row for each of its rows.
//
//     ./score_parquet BUNDLE IN.parquet OUT.parquet [LIBONNXRUNTIME]
//
// Reads with Arrow C++, passes streams of the Arrow C interface to libjql and back; no text is copied in between.
#include <arrow/api.h>
#include <arrow/c/bridge.h>
#include <arrow/io/api.h>
#include <parquet/arrow/reader.h>
#include <parquet/arrow/writer.h>

#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>

#include "jql.h"

namespace {

struct Close {
  void operator()(jql_engine* engine) const { jql_close(engine); }
};
using Engine = std::unique_ptr<jql_engine, Close>;

Engine open_engine(const char* bundle, const char* onnxruntime) {
  char err[512];
  jql_options options = JQL_OPTIONS_INIT;
  options.onnxruntime = onnxruntime;
  jql_engine* engine = nullptr;
  if (jql_open(bundle, &options, &engine, err, sizeof err) != JQL_OK) throw std::runtime_error(err);
  return Engine(engine);
}

// The scores of `texts`, which are pulled as the scores are.
arrow::Result<std::shared_ptr<arrow::RecordBatchReader>> score(jql_engine* engine,
                                                               std::shared_ptr<arrow::RecordBatchReader> texts) {
  char err[512];
  ArrowArrayStream input, scores;
  ARROW_RETURN_NOT_OK(arrow::ExportRecordBatchReader(std::move(texts), &input));
  if (jql_score_arrow(engine, &input, "text", &scores, err, sizeof err) != JQL_OK) {
    input.release(&input);
    return arrow::Status::Invalid(err);
  }
  return arrow::ImportRecordBatchReader(&scores);
}

arrow::Status score_file(jql_engine* engine, const std::string& in, const std::string& out) {
  ARROW_ASSIGN_OR_RAISE(auto source, arrow::io::ReadableFile::Open(in));
  ARROW_ASSIGN_OR_RAISE(auto reader, parquet::arrow::OpenFile(source, arrow::default_memory_pool()));
  ARROW_ASSIGN_OR_RAISE(auto texts, reader->GetRecordBatchReader());
  ARROW_ASSIGN_OR_RAISE(auto scores, score(engine, std::move(texts)));
  ARROW_ASSIGN_OR_RAISE(auto sink, arrow::io::FileOutputStream::Open(out));
  ARROW_ASSIGN_OR_RAISE(auto writer,
                        parquet::arrow::FileWriter::Open(*scores->schema(), arrow::default_memory_pool(), sink));
  while (true) {
    ARROW_ASSIGN_OR_RAISE(auto batch, scores->Next());
    if (!batch) break;
    ARROW_RETURN_NOT_OK(writer->WriteRecordBatch(*batch));
  }
  return writer->Close();
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) {
    std::cerr << "usage: " << argv[0] << " BUNDLE IN.parquet OUT.parquet [LIBONNXRUNTIME]\n";
    return 2;
  }
  Engine engine = open_engine(argv[1], argc > 4 ? argv[4] : nullptr);
  arrow::Status status = score_file(engine.get(), argv[2], argv[3]);
  if (!status.ok()) std::cerr << status.ToString() << "\n";
  return status.ok() ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
