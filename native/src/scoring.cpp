#include "scoring.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>
#include <thread>

namespace jql {

namespace {

// One call: its batches are taken one by one, longest first, by the caller and the threads that help.
class Work {
 public:
  Work(Session& session, Slots& slots, const Documents& documents, const Results& results)
      : session_(session), slots_(slots), documents_(documents), results_(results) {}

  void plan(int64_t max_tokens) {
    order_.resize(documents_.n);
    std::iota(order_.begin(), order_.end(), size_t{0});
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return documents_.length(a) > documents_.length(b); });
    for (size_t begin = 0, end; begin < order_.size(); begin = end) {
      int64_t length = documents_.length(order_[begin]);
      auto most = static_cast<size_t>(std::max<int64_t>(1, max_tokens / length));
      end = begin + 1;
      while (end < order_.size() && end - begin < most && documents_.length(order_[end]) == length) ++end;
      starts_.push_back(begin);
    }
    starts_.push_back(order_.size());
  }

  void run() {
    std::vector<std::thread> helpers;
    size_t n_threads = std::min<size_t>(static_cast<size_t>(session_.n_parallel), starts_.size() - 1);
    helpers.reserve(n_threads);
    try {
      while (helpers.size() + 1 < n_threads) helpers.emplace_back([this] { take_batches(); });
    } catch (const std::exception&) {  // no more threads: those there are do all
    }
    take_batches();
    for (std::thread& helper : helpers) helper.join();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void take_batches() {
    for (size_t i; (i = next_++) + 1 < starts_.size();) {
      slots_.acquire();
      try {
        run_batch(starts_[i], starts_[i + 1]);
      } catch (...) {
        next_ = starts_.size();  // the rest is of no use
        std::lock_guard<std::mutex> lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
      }
      slots_.release();
    }
  }

  void run_batch(size_t begin, size_t end) {
    Batch batch;
    batch.n_docs = static_cast<int64_t>(end - begin);
    batch.length = documents_.length(order_[begin]);
    for (size_t i = begin; i < end; ++i) {
      const int64_t* offset = documents_.offsets + order_[i];
      batch.ids.insert(batch.ids.end(), documents_.ids + offset[0], documents_.ids + offset[1]);
    }
    Output output = session_.run(batch);
    put(output.scores, results_.scores, results_.n_heads, begin, end);
    put(output.embeddings, results_.embeddings, results_.hidden_size, begin, end);
  }

  void put(const std::vector<float>& values, float* out, size_t width, size_t begin, size_t end) const {
    if (!out) return;
    const float* row = values.data();
    for (size_t i = begin; i < end; ++i, row += width) {
      std::copy(row, row + width, out + (results_.rows ? results_.rows[order_[i]] : order_[i]) * width);
    }
  }

  Session& session_;
  Slots& slots_;
  const Documents documents_;
  const Results results_;
  std::vector<size_t> order_;   // of documents, longest first
  std::vector<size_t> starts_;  // of batches, in order_, and its end
  std::atomic<size_t> next_{0};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace

void Slots::acquire() {
  std::unique_lock<std::mutex> lock(mutex_);
  freed_.wait(lock, [this] { return n_ > 0; });
  --n_;
}

void Slots::release() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++n_;
  }
  freed_.notify_one();
}

void compute(Session& session, Slots& slots, const Documents& documents, int64_t max_tokens, const Results& results) {
  Work work(session, slots, documents, results);
  work.plan(max_tokens);
  work.run();
}

}  // namespace jql
